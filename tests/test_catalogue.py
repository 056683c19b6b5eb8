"""The gates of the op catalogue: every row complete, no file without a row, the boundaries of the source tree."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldmfast import ops
from ldmfast.ops import _load

ROOT = Path(__file__).resolve().parent.parent
ROWS = list(ops.ROWS.values())
CSRC = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
by_name = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)


@by_name
def test_row_is_complete(row):
    gives = r"\(.*\) -> (Tensor|\(Tensor q, Tensor scale(, Tensor zero_point)?\))"
    writes = r"\(Tensor\(a!\) .*\) -> \(\)"
    assert re.fullmatch(f"{gives}|{writes}", row.schema)
    assert str(row.overload._schema).startswith(f"ldmfast::{row.name}(")
    arguments = [a.name for a in row.overload._schema.arguments]
    for function in (row.reference, row.fake, row.cost, row.peer):
        assert list(inspect.signature(function).parameters) == arguments
    assert getattr(ops, row.name).__doc__ and row.name in ops.__all__
    assert Path(inspect.getfile(row.reference)).stem == row.name


@by_name
def test_cases_cover_what_breaks_kernels(row):
    cases = list(row.cases())
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    tags = set().union(*(case.tags for case in cases))
    assert {"network", "ragged", "empty", "view"} <= tags
    images = any(isinstance(a, torch.Tensor) and a.ndim == 4 for a in cases[0].args())
    if images and not row.name.startswith("attention"):
        assert "channels_last" in tags
    for case in cases:
        if "big" not in case.tags:
            cost = row.cost(*case.args())
            assert cost.bytes >= 0 and cost.flops >= 0


@by_name
def test_every_backend_has_its_file(row):
    assert (ROOT / f"csrc/cpu/{row.name}.cpp").exists() != row.gpu_only
    assert (ROOT / f"kernels/{row.name}.py").exists() != row.cpu_only
    if row.cpu_only:
        return
    launch = re.search(r"^def launch\(([^)]*)\)", (ROOT / f"kernels/{row.name}.py").read_text(), re.MULTILINE)
    assert launch, "kernels/<op>.py has launch(<schema arguments>)"
    parameters = [p.split(":")[0].split("=")[0].strip() for p in launch.group(1).split(",") if p.strip()]
    parameters = [p for p in parameters if p.isidentifier()]
    assert parameters[: len(row.overload._schema.arguments)] == [a.name for a in row.overload._schema.arguments]


@pytest.mark.parametrize("pattern", ["csrc/cpu/*.cpp", "csrc/cuda/*.cu", "kernels/*.py", "ldmfast/ops/*.py"])
def test_no_file_without_a_row(pattern):
    stems = {p.stem for p in ROOT.glob(pattern) if not p.stem.startswith("_")}
    assert stems <= set(ops.ROWS)


@pytest.mark.parametrize("path", sorted(CSRC), ids=lambda p: p.name)
def test_kernel_file_registers_itself_and_only_one_includes_torch(path):
    text = path.read_text()
    includes = "torch/csrc/stable" in "\n".join(re.findall(r"#include.*", text))
    assert includes == (path.name == "stable.h"), "only csrc/common/stable.h includes torch/csrc/stable"
    if path.parent.name == "host":
        assert "stable.h" not in "\n".join(re.findall(r"#include.*", text))
    if path.suffix in {".cpp", ".cu"} and path.parent.name in {"cpu", "cuda"}:
        assert text.rstrip().endswith(f"_KERNEL({path.stem})"), "registration stands at the bottom"


def test_compiled_registrations_match_their_schemas():
    """The only report of a C++ registration whose name matches no schema; an arity mismatch shows in test_ops."""
    assert [line for line in torch._C._dispatch_find_dangling_impls() if "ldmfast" in line] == []


def test_compiled_kernels_are_live_where_the_library_loaded():
    if not ops.CPU_LIBRARY.loaded:
        assert ops.CPU_LIBRARY.reason
        return
    for row in ROWS:
        assert row.live("cpu") == ("reference" if row.gpu_only else "cpp")
        if row.gpu_only:
            continue
        assert f"csrc/cpu/{row.name}.cpp" in torch._C._dispatch_dump(f"ldmfast::{row.name}").replace("\\", "/")


def test_floats_and_ints_cannot_be_boxed():
    text = (ROOT / "csrc/common/stable.h").read_text()
    boxable = text[text.index("is_boxable ="):text.index(";", text.index("is_boxable ="))]
    assert "float" not in boxable and not re.search(r"\bint\b", boxable)
    for path in CSRC:
        assert "TORCH_BOX(" not in path.read_text() or path.name == "stable.h", "LDMFAST_BOX checks the signature"


def test_kernels_folder_is_flat():
    assert [p for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name != "__pycache__"] == []


@pytest.mark.parametrize("path", sorted([*CSRC, *(ROOT / "ldmfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py"),
                                         ROOT / "setup.py"]), ids=lambda p: p.name)
def test_files_stay_small(path):
    limit = 150 if path.name == "setup.py" else 400 if path.suffix == ".py" else 500
    assert len(path.read_text().splitlines()) <= limit


def test_the_table_lists_every_op_and_is_honest_about_gpus():
    done = subprocess.run([sys.executable, "-m", "ldmfast.ops", "--markdown"], capture_output=True, text=True,
                          cwd=ROOT, check=True)
    assert [line.split("`")[1] for line in done.stdout.splitlines()[2:]] == sorted(ops.ROWS)
    if not any(not p.name.startswith("cpu") for p in (ROOT / "bench/results").glob("*")):
        assert done.stdout.count("compiled, never run") >= sum(not row.cpu_only for row in ROWS)


def test_importing_ops_brings_in_neither_triton_nor_transformers_nor_diffusers():
    code = ("import torch, sys; before = set(sys.modules); import ldmfast, ldmfast.ops; "
            "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "ldmfast" in names
    for heavy in ("triton", "transformers", "diffusers", "PIL", "numpy"):
        assert f"'{heavy}'" not in names


def test_info_names_every_backend():
    import ldmfast

    info = ldmfast.info()
    assert set(info["ops"]) == set(ops.ROWS)
    for text in (info["version"], info["torch"], *ops.ROWS):
        assert text in str(info)
    if _load.host_module():
        assert info["cpu_levels"][0] == "generic"
        assert info["cpu_isa"] in [*info["cpu_levels"], ""]

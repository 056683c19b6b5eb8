"""The command line, run as a user runs it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldmfast.pipelines import read_settings


def ldmfast(*words: str, cwd: Path, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", "ldmfast.cli", *words], cwd=cwd, env=env, text=True,
                          stdout=stdout, stderr=subprocess.PIPE, timeout=300)


def test_generate_then_repeat_from_the_png(tmp_path):
    first = ldmfast("generate", "a red circle above a blue square", "--seed", "3", "--out", "a.png", "--steps", "6",
                    cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert str(tmp_path / "a.png") in first.stdout and "seed 3" in first.stdout
    assert "group_norm_silu (" in first.stdout and "6 steps" in first.stdout
    again = ldmfast("generate", "--from-png", "a.png", "--out", "b.png", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    a, b = (np.asarray(Image.open(tmp_path / n)) for n in ("a.png", "b.png"))
    assert a.shape == (64, 64, 3) and np.array_equal(a, b)
    assert read_settings(tmp_path / "a.png") == read_settings(tmp_path / "b.png")
    other = ldmfast("generate", "a red circle above a blue square", "--seed", "4", "--out", "c.png", "--steps", "6",
                    cwd=tmp_path)
    assert other.returncode == 0 and not np.array_equal(a, np.asarray(Image.open(tmp_path / "c.png")))


@pytest.mark.parametrize("words, said", [
    (("generate",), "no prompt"),
    (("generate", "x", "--model", "nowhere"), "nowhere"),
    (("generate", "x", "--out", "a.jpg"), ".png"),
    (("generate", "x", "--out", "no/such/a.png"), "does not exist"),
    (("generate", "x", "--solver", "dimm"), "ddim"),
    (("generate", "x", "--height", "65"), "height=65"),
    (("generate", "x", "--image", "none.png"), "none.png"),
    (("generate", "--from-png", "none.png"), "none.png"),
    (("generate", "x", "--from-png", "none.png"), "prompt"),
    (("inspect", "nowhere"), "nowhere"),
    (("inspect", "x" * 300), "File name too long"),
    (("generate", "a \udcff"), "half a character"),
    (("generate", "x", "--steps", "1", "--out", "/proc/a.png"), "/proc/a.png: cannot be written"),
    (("generate", "x", "--model", "sd15"), "sd15: does not exist"),
])
def test_refusals_are_one_line_and_exit_2(tmp_path, words, said):
    done = ldmfast(*words, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ldmfast: ")]
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_inspect_and_info(tmp_path):
    import ldmfast as package

    folder = Path(package.__file__).parent / "assets" / "tiny"
    told = ldmfast("inspect", str(folder), cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    for word in ("unet", "vae", "text_encoder", "UNet2DConditionModel", "float16"):
        assert word in told.stdout, told.stdout
    facts = ldmfast("info", cwd=tmp_path)
    assert facts.returncode == 0, facts.stderr
    for word in (package.__version__, "attention", "group_norm_silu", "torch"):
        assert word in facts.stdout, facts.stdout


def test_help_teaches(tmp_path):
    text = ldmfast("generate", "--help", cwd=tmp_path).stdout
    assert "Examples" in text and "--from-png" in text


def test_convert(tmp_path):
    """A shipped folder in another dtype, as a user types it; then each refusal is one line."""
    import safetensors.torch
    import torch

    import ldmfast as package

    folder = Path(package.__file__).parent / "assets" / "tiny"
    done = ldmfast("convert", str(folder), "new", "--dtype", "bfloat16", cwd=tmp_path)
    assert done.returncode == 0 and "written to new" in done.stdout and "100%" in done.stderr, done.stderr
    file = "unet/diffusion_pytorch_model.safetensors"
    old, new = (safetensors.torch.load_file(f / file) for f in (folder, tmp_path / "new"))
    assert old.keys() == new.keys() and all(torch.equal(new[k], v.bfloat16()) for k, v in old.items())
    again = ldmfast("convert", str(folder), "new", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert "Examples" in ldmfast("convert", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize("words", [("info",), ("quantize", "x")])
def test_a_wrong_isa_is_one_line_of_every_command(tmp_path, monkeypatch, words):
    """It is told when the kernels are imported, which some commands did outside of what they catch."""
    monkeypatch.setenv("LDMFAST_CPU_ISA", "nonsense")
    done = ldmfast(*words, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("ldmfast: LDMFAST_CPU_ISA='nonsense'")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["at the end", "at once"])
def test_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        done = ldmfast("info", cwd=tmp_path, stdout=full)
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "ldmfast: the output cannot be written (No space left on device)"]

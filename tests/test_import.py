"""``import ldmfast`` stays light: the heavy packages come in where they are first used."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("transformers", "diffusers", "triton", "PIL", "tqdm", "typer", "safetensors")


def modules_after(code: str) -> set[str]:
    out = subprocess.run([sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"], text=True,
                         capture_output=True, check=True).stdout
    return set(out.split())


def test_nothing_heavy_is_imported_beyond_torch():
    before = modules_after("import torch")
    for code in ("import ldmfast", "import ldmfast; ldmfast.ops; ldmfast.samplers; ldmfast.models; ldmfast.info()"):
        new = modules_after(code) - before
        assert not new & set(HEAVY), (code, sorted(new & set(HEAVY)))


def test_everything_named_is_there():
    import ldmfast

    for name in ldmfast.__all__:
        assert getattr(ldmfast, name) is not None, name
    assert set(ldmfast.__all__) == set(dir(ldmfast))

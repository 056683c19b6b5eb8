"""``import ldmfast`` stays light: the heavy packages come in where they are first used."""

from __future__ import annotations

import subprocess
import sys

import resident

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


@resident.NEEDED
def test_import_costs_little_beyond_torch():
    """At most 0.3 CPU seconds and 40 MB over ``import torch``, as differences within one process."""
    seconds, grown = map(float, resident.fresh(
        "import time, torch; memory, start = resident.now(), time.process_time(); import ldmfast; "
        "print(time.process_time() - start, resident.now() - memory)").split())
    assert seconds <= 0.3
    assert 0 <= grown <= 40e6


def test_everything_named_is_there():
    import ldmfast

    for name in ldmfast.__all__:
        assert getattr(ldmfast, name) is not None, name
    assert set(ldmfast.__all__) == set(dir(ldmfast))

"""Slices of tools/many_calls.py, and proof that it sees mixed-up calls and growing memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import resident
import torch

TOOL = Path(__file__).resolve().parents[1] / "tools" / "many_calls.py"


@pytest.fixture(scope="module")
def many() -> ModuleType:
    spec = importlib.util.spec_from_file_location("many_calls", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", ["native", "diffusers"])
def test_threads_equal_serial(model, many):
    assert many.from_threads(getattr(many, model)("exact"), 12, 5) == (0, 0)


def test_mixed_up_calls_are_seen(many):
    """Threads that share what a call writes must not pass as sound, nor those that raise."""
    shared = np.zeros(1)
    gate = threading.Barrier(2)
    main = threading.get_ident()

    def draw(i, **_):
        shared[:] = i
        if threading.get_ident() != main:
            gate.wait()
            if i == 1:
                raise ValueError
        return shared.copy()

    other, raised = many.from_threads(draw, 2, 3)
    assert raised == 2 and other >= 1


@resident.NEEDED
def test_random_shapes():
    """In a process of its own, as torch's caches are set when it is loaded."""
    run = subprocess.run([sys.executable, str(TOOL), "shapes", "--calls", "24"], capture_output=True, text=True,
                         check=False, env={**os.environ, **resident.ENVIRONMENT})
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ": 0 networks built, 0 weights packed," in run.stdout


_GROWING = """
import mmap, sys
import numpy as np
from ldmfast.models.gemm import Linear

sys.path.insert(0, sys.argv[1])
import many_calls

kept = []

def draw(i, **_):
    kept.append(mmap.mmap(-1, 1 << 20))  # fresh pages, whatever the heap has free
    kept[-1].write(b"1" * (1 << 20))
    Linear(8, 8).pack()
    return np.frombuffer(kept[-1], np.uint8)

found = many_calls.random_shapes(draw, 8)
print(found.grown, found.grown_trimmed, found.made["weights packed"], found.holds)
"""


@resident.NEEDED
def test_growth_and_packing_are_seen():
    grown, trimmed, packed, holds = resident.fresh(_GROWING, TOOL.parent).split()
    print(f"8 MiB kept: {int(grown) / resident.MIB:.2f} MiB seen, {int(trimmed) / resident.MIB:.2f} after malloc_trim")
    assert min(int(grown), int(trimmed)) >= 7 * resident.MIB and (packed, holds) == ("8", "False")

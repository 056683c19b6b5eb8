"""A slice of tools/fuzz_checkpoints.py with cases of its own, and proof that it can see a fault."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ldmfast.checkpoints import safetensors
from ldmfast.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see resident memory")
TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz_checkpoints.py"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fuzz_checkpoints", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.bases = module.Bases()
    before = signal.signal(signal.SIGALRM, module.interrupted)
    yield module
    signal.signal(signal.SIGALRM, before)
    shutil.rmtree(module.bases.folder)


@pytest.mark.parametrize("kind, count, least", [("safetensors", 400, 40), ("gguf", 400, 20), ("json", 150, 5)])
def test_a_slice(kind: str, count: int, least: int, fuzz: ModuleType, monkeypatch) -> None:
    """No crash, one line, no hang, bounded memory. Some must be read, or the damage is too coarse to reach far. The
    second of CPU time that a case may take is the tool's to judge: a suite shares its machine."""
    if kind == "gguf":
        pytest.importorskip("gguf", reason="the optional package gguf is not installed")
    monkeypatch.setattr(fuzz, "SECONDS", float("inf"))
    for number in range(3):  # libraries that a first case loads are no case's memory
        fuzz.run_case(kind, 98, number, fuzz.bases)
    outcomes = Counter(fuzz.run_case(kind, 99, number, fuzz.bases) for number in range(count))
    print(f"{kind}: {dict(outcomes)}")
    assert outcomes.keys() <= {"read", "refused"}, outcomes
    assert outcomes["read"] >= least and outcomes["refused"] >= least


def test_faults_are_seen(fuzz: ModuleType, monkeypatch) -> None:
    """A reader that raises something else, takes long, or takes much memory to refuse must not pass as sound."""
    def raises(path: Path) -> None:
        raise KeyError("x")

    def costs(path: Path) -> None:
        held = bytearray(64 << 20)
        raise CheckpointError(f"{path}: {len(held)}")

    def spins(path: Path) -> None:
        start = time.process_time()
        while time.process_time() < start + 1.1:
            pass

    def two_lines(path: Path) -> None:
        raise CheckpointError("a\nb")

    for fault, said in ((raises, "KeyError at"), (costs, "MiB for a refusal"), (two_lines, "refused in 2 lines"),
                        (spins, "CPU seconds")):
        monkeypatch.setattr(fuzz, "read_all", fault)
        assert said in fuzz.run_case("safetensors", 99, 0, fuzz.bases)


def test_a_crash_is_named_and_the_rest_goes_on(fuzz: ModuleType, monkeypatch) -> None:
    def crashes(path: Path) -> None:
        if path.stat().st_size % 3 == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(fuzz, "read_all", crashes)
    counts, failed = fuzz.run_chunk("safetensors", 99, range(12), fuzz.bases)
    assert sum(counts.values()) == 12 and 0 < len(failed) < 12
    assert all("the process died (-" in what for _, what in failed)


def test_cases_repeat(fuzz: ModuleType) -> None:
    """A number that was reported is the same file again."""
    made = []
    for _ in range(2):
        fuzz.run_case("safetensors", 5, 17, fuzz.bases)
        made.append((fuzz.bases.folder / "x.safetensors").read_bytes())
    assert made[0] == made[1]
    with pytest.raises(CheckpointError):
        (fuzz.bases.folder / "x.safetensors").write_bytes(made[0][:9])
        safetensors.read_header(fuzz.bases.folder / "x.safetensors")

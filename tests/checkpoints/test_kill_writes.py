"""A slice of tools/kill_writes.py, and proof that it would see a file that is written under its final name."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
TOOL = Path(__file__).resolve().parents[2] / "tools" / "kill_writes.py"


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_writes", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ten_instants_of_each_write(kill: ModuleType, tmp_path: Path, capsys) -> None:
    (tmp_path / "from").mkdir()
    for write in kill.sources(tmp_path / "from"):
        assert kill.report(write, tmp_path / "to", 10) == 0
    lines = capsys.readouterr().out.splitlines()
    print("\n".join(lines))
    assert len(lines) == 6
    caught = [int(line.split(" with a temporary")[0].rpartition(" ")[2]) for line in lines]
    assert sum(caught) >= 6, lines  # children that died in the middle of writing: otherwise nothing was tried


def test_a_half_file_is_seen(kill: ModuleType, tmp_path: Path) -> None:
    def careless(target: Path) -> None:
        with target.open("wb") as file:
            for _ in range(20):
                file.write(b"x" * 1000)
                file.flush()
                time.sleep(0.005)

    assert kill.report(kill.Write("careless", "x", careless), tmp_path / "to", 10) >= 5

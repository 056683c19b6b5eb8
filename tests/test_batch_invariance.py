"""A slice of tools/batch_invariance.py: in precision "exact" a picture does not depend on its neighbours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "batch_invariance.py"


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_pictures_of_a_batch_of_eight_in_exact(network: str) -> None:
    spec = importlib.util.spec_from_file_location("batch_invariance", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # dataclasses look their module up
    spec.loader.exec_module(tool)
    found = tool.compare(network, "exact", 3)
    assert (found.equal, found.worst) == (8, 0.0)

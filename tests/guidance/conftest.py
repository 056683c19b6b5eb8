from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ldmfast


@pytest.fixture(scope="session")
def tiny() -> dict[str, ldmfast.Pipeline]:
    return {p: ldmfast.Pipeline.tiny(precision=p) for p in ("exact", "bf16")}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are so small that a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

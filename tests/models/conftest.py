"""The reduced networks are so small that a second thread costs more than it gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    if "full_size" not in request.node.nodeid:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ldmfast


@pytest.fixture(scope="session")
def tiny() -> ldmfast.Pipeline:
    return ldmfast.Pipeline.tiny()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

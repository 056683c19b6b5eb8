"""Large results that lend their memory to later ones inside ``reused_memory``."""

from __future__ import annotations

import threading

import pytest
import resident
import torch

from ldmfast import ops
from ldmfast.ops._load import reused_memory

SIZE = (1, 64, 512, 512)  # bf16: 32 MiB
NEEDS = pytest.mark.skipif(not ops.CPU_LIBRARY.loaded or torch.__version__ < "2.11",
                           reason="the compiled kernels on torch 2.11 or later lend memory; there are none here")


def norm(x: torch.Tensor) -> torch.Tensor:
    return ops.group_norm_silu(x, 8)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()


@NEEDS
def test_a_freed_result_lends_its_memory_and_a_live_one_does_not(image):
    expected = norm(image)
    with reused_memory():
        first = norm(image)
        kept = first.data_ptr()
        second = norm(image * 2)
        assert second.data_ptr() != kept
        assert torch.equal(first, expected)
        del first
        third = norm(image)
        assert third.data_ptr() == kept
        assert torch.equal(third, expected)
        assert third.is_contiguous() and third.storage_offset() == 0 and third.shape == SIZE
    assert torch.equal(third, expected)  # a result outlives the call


_FREED = """
import torch
from test_reused_memory import SIZE, norm
from ldmfast.ops._load import reused_memory

image = torch.randn(SIZE).bfloat16()
norm(image)
before = resident.now()
with reused_memory():
    with reused_memory():
        results = [norm(image) for _ in range(4)]
        del results
    print(resident.now() - before)
print(resident.now() - before)
two, three = torch.cat([image] * 2, dim=2), torch.cat([image] * 3, dim=2)
with reused_memory():
    norm(two)  # 64 MiB, free again
    before = resident.now()
    kept = norm(three)  # 96 MiB, in whose favour they go
    print(resident.now() - before)
    assert torch.equal(kept[:, :, :1], norm(three)[:, :, :1])
"""


@NEEDS
@resident.NEEDED
def test_free_memory_goes_back_at_the_end_and_in_favour_of_larger_results():
    """Never is more free and used together than was used at once, and nothing is kept after the block of code."""
    during, after, instead = (int(line) / resident.MIB for line in resident.fresh(_FREED).split())
    print(f"four results of 32 MiB: {during:.1f} MiB while kept, {after:.1f} after; 96 for 64 MiB: {instead:.1f}")
    assert 120 < during < 136  # the outer block of code still keeps the four
    assert after < 32 and instead < 64


@NEEDS
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.int16, torch.float64], ids=str)
def test_memory_is_as_large_as_the_numbers_of_any_dtype(dtype):
    x = (torch.arange(1500 * 1500) % 97).view(1, 1, 1500, 1500).to(dtype)
    with reused_memory():
        y = ops.upsample2x(x)
    assert torch.equal(y[:, :, 1::2, ::2], x) and torch.equal(y[:, :, ::2, 1::2], x)


@NEEDS
def test_threads_share_it_without_a_mix_up(image):
    inputs = [image * k for k in (1, 2, 3, 4)]
    expected = [norm(x) for x in inputs]
    wrong: list[int] = []

    def work(k: int) -> None:
        with reused_memory():
            for _ in range(4):
                if not torch.equal(norm(inputs[k]), expected[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_an_error_inside_ends_it():
    with pytest.raises(RuntimeError, match="stop"), reused_memory():
        raise RuntimeError("stop")
    with reused_memory():
        pass

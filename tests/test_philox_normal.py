"""philox_normal beyond what test_ops.py generates: known answers, CUDA's own numbers, the same bits everywhere."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from ldmfast import ops
from ldmfast.errors import LdmfastError, ShapeError

sys.path.insert(0, str(Path(__file__).parent))
row = importlib.import_module("ldmfast.ops.philox_normal")  # the package's attribute of this name is the function

ONES = 0xFFFFFFFF
KNOWN = [  # of Random123, kat_vectors: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter, key, result):
    words = row.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == result


def test_numbers_are_those_that_torch_prints_on_cuda():
    """First numbers of torch.randn(..., device="cuda") after manual_seed(0) and (42), as people have published them."""
    printed = torch.tensor([[-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284, -1.0745, -0.3631,
                             -1.6711, 2.2655, 0.3117, -0.1842, 1.2866, 1.1820],
                            [0.1940, 2.1614, -0.1721, 0.8491, -1.9244, 0.6530, -0.6494, -0.8175, 0.5280, -1.2753,
                             -1.6621, -0.3033, -0.0926, 0.1992, -1.1204, 1.8577]])
    assert (ops.philox_normal(torch.tensor([[0, 0], [42, 0]]), 16) - printed).abs().max() < 0.6e-4


def test_compiled_kernel_has_the_bits_of_the_reference():
    state = torch.tensor([[5, 0], [6, 4], [-3, 2**40]])
    assert torch.equal(ops.philox_normal(state, 100_003, threads=8192), row.reference(state, 100_003, 8192))


def test_advancing_the_offset_continues_the_stream():
    """Two calls of torch on one generator: the second starts where the first has left its offset."""
    state, threads = torch.tensor([[9, 0]]), 256
    both = ops.philox_normal(state, 2 * 4 * threads, threads=threads)
    first = ops.philox_normal(state, 4 * threads, threads=threads)
    second = ops.philox_normal(state + torch.tensor([[0, 4]]), 4 * threads, threads=threads)
    assert torch.equal(both, torch.cat([first, second], 1))


def test_numbers_are_normal():
    x = ops.philox_normal(torch.tensor([[123, 0]]), 1 << 20).double()
    moments = [float((x**k).mean()) for k in (1, 2, 3, 4)]
    for found, expected, spread in zip(moments, (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5)):
        assert abs(found - expected) < 4 * spread / 1024
    assert x.abs().max() < 6.8  # sqrt(-2 log 2^-33)


def test_gpu_code_fuses_nothing():
    """A fused fp64 product and sum has other bits than the CPU's two roundings."""
    pytest.importorskip("triton", reason="triton is not installed")
    from test_triton import resources

    tool = resources()
    calls = [arguments for op, _, arguments in tool.triton_calls() if op == "philox_normal"]
    launch = importlib.import_module("ldmfast.kernels.philox_normal").launch
    caught, = tool.catch(lambda: launch(*calls[0]))
    code = tool.compile_triton(caught, 90).asm["ptx"]
    assert code.count("mul.rn.f64") + code.count("mul.f64") > 30 and "fma" not in code


BAD = {
    "rank": (lambda: ops.philox_normal(torch.tensor([1, 0]), 4), ShapeError, r"int64 of \(N, 2\)"),
    "dtype": (lambda: ops.philox_normal(torch.zeros(1, 2), 4), ShapeError, "torch.float32"),
    "count": (lambda: ops.philox_normal(torch.tensor([[1, 0]]), -1), LdmfastError, "count is -1"),
    "threads": (lambda: ops.philox_normal(torch.tensor([[1, 0]]), 4, threads=300), LdmfastError, "multiple of 256"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)

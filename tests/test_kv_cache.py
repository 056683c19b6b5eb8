"""kv_append and kv_gather beyond what test_ops.py generates: fuzz, every width, attention over a ring, bad input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmfast import ops
from ldmfast.errors import DeviceError, LdmfastError, ShapeError
from ldmfast.ops._op import case as make_case

sys.path.insert(0, str(Path(__file__).parent))
import parity

SIZE = st.integers(0, 6)
LAYOUTS = st.sampled_from(["contiguous", "view"])


def holds(row: str, make, dtype: torch.dtype) -> None:
    assert parity.failure(ops.ROWS[row], make_case("fuzz", "", make), dtype) == ""


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIZE, st.integers(0, 9), SIZE, st.lists(st.integers(0, 5), max_size=2), LAYOUTS, st.booleans(), st.booleans(),
       st.sampled_from(parity.DTYPES))
def test_fuzz_kv_append(batch, capacity, tokens, row, layout, ring, each, dtype):
    tokens = min(tokens, capacity)

    def make(d):  # distinct rows, some of them none
        order = [torch.randperm(capacity + 2, generator=d.generator)[:tokens] - 2 * (not ring)
                 for _ in range(max(1, batch if each else 1))]
        positions = torch.stack(order)
        if ring:
            positions = torch.arange(tokens).expand_as(positions) + 3
        return (d.normal(batch, capacity, *row, layout=layout), d.normal(batch, tokens, *row),
                positions[:batch] if each else positions, ring)

    holds("kv_append", make, dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIZE, st.integers(0, 9), SIZE, st.lists(st.integers(0, 5), max_size=2), LAYOUTS, st.booleans(),
       st.none() | st.lists(st.integers(-1, 6), max_size=5), st.sampled_from(parity.DTYPES))
def test_fuzz_kv_gather(batch, held, tokens, row, layout, ring, source, dtype):
    def make(d):
        results = batch if source is None else len(source)
        positions = torch.randint(-2, held + 3, (results, tokens), generator=d.generator)
        elements = None if source is None else torch.tensor(source, dtype=torch.int64)
        return d.normal(batch, held, *row, layout=layout), positions, elements, ring

    holds("kv_gather", make, dtype)


@pytest.mark.parametrize("run", ["live", "reference"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16, torch.float32, torch.int64], ids=str)
def test_every_width_moves(dtype, run):
    """A cache may hold codes: bytes are moved, whatever they mean."""
    def call(name, *args):
        return (ops.ROWS[name].overload if run == "live" else ops.ROWS[name].reference)(*args)

    g = torch.Generator().manual_seed(4)
    cache, new = (torch.randint(-8, 8, (2, t, 3, 5), generator=g).to(dtype) for t in (6, 2))
    before = cache.clone()
    call("kv_append", cache, new, torch.tensor([[4, 1], [0, -1]]), False)
    for b, pairs in enumerate([{4: 0, 1: 1}, {0: 0}]):
        for t in range(6):
            expected = new[b, pairs[t]] if t in pairs else before[b, t]
            assert torch.equal(cache[b, t].float(), expected.float())
    out = call("kv_gather", cache, torch.tensor([[5, -1, 0]]), torch.tensor([1, 0, 2]), False)
    assert torch.equal(out[:, 0].float(), torch.stack([cache[1, 5], cache[0, 5], torch.zeros(3, 5).to(dtype)]).float())
    assert not out[:, 1].float().any() and torch.equal(out[1, 2].float(), cache[0, 0].float())


def test_attention_over_a_ring_is_that_over_the_last_tokens():
    """Streaming: blocks of 3 tokens over a window of 12; keys and values of a ring are in another order, which softmax
    does not see. The oracle keeps everything and computes in float64."""
    g = torch.Generator().manual_seed(7)
    window, block, heads, depth = 12, 3, 2, 16
    qkv = torch.randn(2, 24, 3, heads, depth, generator=g)
    cache = torch.full((2, window, 2, heads, depth), float("nan"))
    position = torch.arange(block)
    for start in range(0, 24, block):
        new = qkv[:, start:start + block]
        ops.kv_append(cache, new[:, :, 1:], position, ring=True)
        position.add_(block)
        held = min(start + block, window)
        found = ops.attention(new[:, :, 0], cache[:, :held, 0], cache[:, :held, 1])
        seen = qkv[:, max(0, start + block - window):start + block].double()
        score = torch.einsum("bqhd,bkhd->bhqk", new[:, :, 0].double(), seen[:, :, 1]) * depth**-0.5
        expected = torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), seen[:, :, 2])
        assert (found - expected).abs().max() < 2e-6
    in_order = ops.kv_gather(cache, torch.arange(12, 24), ring=True)
    assert torch.equal(in_order, qkv[:, 12:24, 1:])


C, NEW, AT = torch.zeros(2, 6, 2, 4), torch.zeros(2, 3, 2, 4), torch.arange(3)
BAD = {
    "shape": (lambda: ops.kv_append(C, NEW[..., :3], AT), ShapeError, "differs in tokens only"),
    "batch": (lambda: ops.kv_append(C, NEW[:1], AT), ShapeError, "differs in tokens only"),
    "dtype": (lambda: ops.kv_append(C, NEW.half(), AT), LdmfastError, "give them one dtype"),
    "rows": (lambda: ops.kv_append(torch.zeros(2, 6, 2, 8)[..., ::2], NEW, AT), LdmfastError, "adjacent in memory"),
    "count": (lambda: ops.kv_append(C, NEW, torch.arange(2)), ShapeError, "2 positions for 3 new tokens"),
    "positions": (lambda: ops.kv_append(C, NEW, AT.expand(3, 3)), ShapeError, r"needs \(tokens,\) or \(2, tokens\)"),
    "floats": (lambda: ops.kv_append(C, NEW, AT.float()), DeviceError, "needs torch.int64"),
    "device": (lambda: ops.kv_append(C, NEW.to("meta"), AT), DeviceError, "bring both to one device"),
    "ring": (lambda: ops.kv_append(C[:, :2], NEW, AT, ring=True), ShapeError, "more than once"),
    "gather_rank": (lambda: ops.kv_gather(C[0, 0, 0], AT), ShapeError, "batch, tokens"),
    "gather_source": (lambda: ops.kv_gather(C, AT, AT.view(1, 3)), ShapeError, "needs one dimension"),
    "gather_floats": (lambda: ops.kv_gather(C, AT, AT.float()), DeviceError, "source is torch.float32"),
    "gather_positions": (lambda: ops.kv_gather(C, AT.expand(2, 3), AT), ShapeError, r"or \(3, tokens\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_cache_moves_its_own_rows() -> None:
    cache = torch.arange(40.0).view(1, 5, 8)
    wanted = cache.clone()
    wanted[:, 1:4] = cache[:, :3].clone()
    ops.kv_append(cache, cache[:, :3], torch.tensor([1, 2, 3]))
    assert torch.equal(cache, wanted)


def test_rows_that_share_memory_are_refused() -> None:
    with pytest.raises(LdmfastError, match="expanded"):
        ops.kv_append(torch.zeros(1, 4, 8).expand(2, 4, 8), torch.ones(2, 1, 8), torch.tensor([0]))

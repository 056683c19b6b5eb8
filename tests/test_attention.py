"""attention beyond the row's cases: what is not a number, and queries that need the second sweep beside such that
do not. The kernel shifts its weights by a bound on the scores and falls back to the true maximum."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from ldmfast import ops

sys.path.insert(0, str(Path(__file__).parent))
import parity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(dtype, tokens=70, keys=90, heads=2, width=40):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(1, n, heads, width, generator=g).to(dtype) for n in (tokens, keys, keys)]


def close(out, q, k, v, scale=None, causal=False):
    row, args = ops.ROWS["attention"], (q, k, v, None, q.shape[3] ** -0.5 if scale is None else scale, causal, 1)
    exact = row.reference(*parity.cast(args, torch.float64))
    assert float((out.double() - exact).abs().max()) <= parity.allowed(row, args, q.dtype, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_spoils_itself_alone(dtype, bad):
    q, k, v = inputs(dtype)
    clean = q.clone()
    q[0, 40, 1, 3] = bad
    out = ops.attention(q, k, v)
    assert torch.isnan(out[0, 40, 1]).all()
    out[0, 40, 1] = ops.attention(clean, k, v)[0, 40, 1]
    close(out, clean, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_bad_key_or_value_spoils_its_head_alone(dtype, which):
    q, k, v = inputs(dtype)
    clean = [k.clone(), v.clone()]
    (k if which == "key" else v)[0, 77, 0] = float("nan")
    out = ops.attention(q, k, v)
    assert torch.isnan(out[:, :, 0]).all()
    close(out[:, :, 1:], q[:, :, 1:], clean[0][:, :, 1:], clean[1][:, :, 1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_queries_far_below_the_bound_beside_ordinary_ones(dtype):
    q, k, v = inputs(dtype, tokens=130, width=64)
    k -= 5.0
    q[:, ::3] += 5.0  # scores of about -200, where |q| |k| allows 200
    close(ops.attention(q, k, v), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_huge_scores_pick_one_key(dtype):
    q, k, v = inputs(dtype, keys=65)
    k.zero_()
    k[:, 31, :, 0] = 200.0
    q[..., 0] = 200.0 * torch.sign(q[..., 0])
    close(ops.attention(q, k, v, scale=40.0), q, k, v, scale=40.0)  # 1.6e6: no bound is used


@pytest.mark.parametrize("last", [-30.0, 0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_first_of_many_keys_may_mislead(dtype, last):
    """Scores of +-35 about a mean that leaps after the keys from which the kernel takes its first impression: by -340,
    not at all, or by 340."""
    q, k, v = inputs(dtype, tokens=40, keys=1300, width=32)
    q *= 4.4
    q[..., 0] = 8.0
    k[:, 1100:, :, 0] += last
    for causal in (False, True):
        out = ops.attention(q, k, v, scale=1.4, causal=causal)
        close(out, q, k, v, scale=1.4, causal=causal)


@pytest.mark.parametrize("scale", [0.0, -0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_scale_of_either_sign(dtype, scale):
    q, k, v = inputs(dtype)
    out = ops.attention(q, k, v, scale=scale, causal=True)
    close(out, q, k, v, scale, True)


def _relay(depth: int, queries: int, keys: int, block: int) -> str:
    torch.set_num_threads(2)
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, n, 2, depth, generator=g).bfloat16() for n in (queries, keys, keys))
    row, args = ops.ROWS["attention"], (q, k, v, None, depth**-0.5, True, block)
    exact = row.reference(*parity.cast(args, torch.float64))
    error, limit = parity.distance(row.overload(*args), exact), parity.allowed(row, args, torch.bfloat16, exact)
    return "" if error <= limit else f"error {error:.3g}, allowed {limit:.3g}"


def test_a_longer_task_after_a_shorter_one_of_the_same_head():
    """The longer one needs more room, so what the shorter one has packed moves away. Seen in a fresh process only,
    whose threads have no room yet: more keys than fit at once, of which both tasks see the same first ones."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_relay, (160, 192, 1600, 384)) == ""

"""The rows that transformers use, beyond what test_ops.py generates: fuzz, diffusers as a second oracle, bad input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmfast import ops
from ldmfast.errors import LdmfastError, ShapeError
from ldmfast.ops._op import case as make_case

sys.path.insert(0, str(Path(__file__).parent))
import parity

TYPES = st.sampled_from(parity.DTYPES)
LAYOUTS = st.sampled_from(["contiguous", "view", "slice"])
SIZE = st.integers(0, 9)


def fuzz(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.too_slow])


def holds(row: str, make, dtype: torch.dtype) -> None:
    assert parity.failure(ops.ROWS[row], make_case("fuzz", "", make), dtype) == ""


@fuzz(40)
@given(st.lists(st.integers(0, 6), max_size=3), st.integers(1, 150), LAYOUTS, st.booleans(), TYPES)
def test_fuzz_rms_norm(lead, c, layout, weighted, dtype):
    holds("rms_norm", lambda d: (d.normal(*lead, c, layout=layout, offset=0.3), d.normal(c) if weighted else None,
                                 1e-6), dtype)


@fuzz(40)
@given(SIZE, SIZE, st.integers(1, 150), LAYOUTS, LAYOUTS, st.booleans(), TYPES)
def test_fuzz_gate_residual(n, tokens, c, layout, other, shared, dtype):
    holds("gate_residual", lambda d: (d.normal(n, tokens, c, layout=layout), d.normal(n, tokens, c, layout=other),
                                      d.normal(1 if shared else n, c)), dtype)


@fuzz(60)
@given(st.integers(0, 3), SIZE, st.integers(0, 5), st.integers(1, 5), st.integers(1, 70), LAYOUTS, st.booleans(),
       st.booleans(), st.sampled_from([None, 1e-6]), TYPES)
def test_fuzz_qk_norm_rope(b, tokens, text, heads, half, layout, rope, interleaved, eps, dtype):
    def make(d):
        angle = d.normal(tokens + text, half, scale=2.0, dtype=torch.float64)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (3, heads, 2 * half)
        weights = [None if eps is None else d.normal(2 * half, offset=1.0, scale=0.2) for _ in range(2)]
        return (d.normal(b, tokens, *shape, layout=layout), d.normal(b, text, *shape) if text else None, *weights, None,
                None, *(f(angle).to(wide) if rope else None for f in (torch.cos, torch.sin)), interleaved, eps)

    holds("qk_norm_rope", make, dtype)


def test_joint_attention_inputs_are_those_of_diffusers_flux():
    """Norms, order of the tokens, rotation and its angles as FluxAttnProcessor computes them, on its own modules."""
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    g = torch.Generator().manual_seed(1)
    image, text = (torch.randn(2, t, 3, 2, 16, generator=g) for t in (12, 5))
    ids = torch.cat([torch.zeros(5, 3), torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))])
    cos, sin = FluxPosEmbed(10000, [4, 6, 6])(ids)  # every angle twice, for the two channels of a pair
    norms = [RMSNorm(16, eps=1e-6) for _ in range(4)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1.0, 0.2, generator=g)
    expected = []
    with torch.no_grad():
        for i, (own, of_text) in enumerate((norms[:2], norms[2:])):
            joint = torch.cat([of_text(text[:, :, i]), own(image[:, :, i])], 1)
            expected.append(apply_rotary_emb(joint, (cos, sin), sequence_dim=1))
    expected.append(torch.cat([text[:, :, 2], image[:, :, 2]], 1))
    found = ops.qk_norm_rope(image, text, q_weight=norms[0].weight.data, context_q_weight=norms[1].weight.data,
                             k_weight=norms[2].weight.data, context_k_weight=norms[3].weight.data,
                             cos=cos[:, ::2], sin=sin[:, ::2])
    for one, other in zip(found, expected):
        assert (one - other).abs().max() <= 4 * torch.finfo(torch.float32).eps * other.abs().max()
    assert len({t.untyped_storage().data_ptr() for t in found}) == 1, "one buffer, which attention reads in place"


def test_rotation_of_halves_is_that_of_diffusers():
    from diffusers.models.embeddings import apply_rotary_emb

    x, angle = torch.randn(1, 7, 3, 2, 24), torch.rand(7, 12)
    table = [torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin)]
    q, k, v = ops.qk_norm_rope(x, cos=angle.cos(), sin=angle.sin(), interleaved=False, eps=None)
    for i, found in enumerate((q, k)):
        expected = apply_rotary_emb(x[:, :, i], table, use_real_unbind_dim=-2, sequence_dim=1)
        assert (found - expected).abs().max() < 1e-6
    assert v.data_ptr() == x[:, :, 2].data_ptr() and torch.equal(v, x[:, :, 2])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_batch_does_not_change_a_picture(dtype):
    g = torch.Generator().manual_seed(3)
    x, y, gate = (torch.randn(3, *s, generator=g).to(dtype) for s in ((31, 80), (31, 80), (80,)))
    qkv, context = (torch.randn(3, t, 3, 2, 40, generator=g).to(dtype) for t in (19, 5))
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(ops.rms_norm(x)[one], ops.rms_norm(x[one]))
        assert torch.equal(ops.gate_residual(x, y, gate)[one], ops.gate_residual(x[one], y[one], gate[one]))
        for all_of_it, alone in zip(ops.qk_norm_rope(qkv, context), ops.qk_norm_rope(qkv[one], context[one])):
            assert torch.equal(all_of_it[one], alone)


T, QKV, TABLE = torch.randn(2, 5, 8), torch.randn(2, 5, 3, 2, 8), torch.ones(5, 4)
BAD = {
    "rms_weight": (lambda: ops.rms_norm(T, torch.ones(7)), ShapeError, r"weight has shape \(7,\), needs \(8,\)"),
    "rms_scalar": (lambda: ops.rms_norm(torch.tensor(1.0)), ShapeError, "no dimension"),
    "gate": (lambda: ops.gate_residual(T, T, torch.ones(3, 8)), ShapeError, r"gate has shape \(3, 8\)"),
    "gate_shapes": (lambda: ops.gate_residual(T, T[:1], torch.ones(8)), ShapeError, r"y \(1, 5, 8\)"),
    "gate_dtypes": (lambda: ops.gate_residual(T, T.half(), torch.ones(8)), LdmfastError, "give them one dtype"),
    "qkv": (lambda: ops.qk_norm_rope(T), ShapeError, r"needs \(batch, tokens, 3, heads, head_dim\)"),
    "odd_depth": (lambda: ops.qk_norm_rope(QKV[..., :7]), ShapeError, "even head_dim"),
    "context": (lambda: ops.qk_norm_rope(QKV, QKV[:1]), ShapeError, "may differ .* in its tokens only"),
    "context_dtype": (lambda: ops.qk_norm_rope(QKV, QKV.half()), LdmfastError, "one dtype"),
    "half_a_table": (lambda: ops.qk_norm_rope(QKV, cos=TABLE), LdmfastError, "give both or neither"),
    "table": (lambda: ops.qk_norm_rope(QKV, QKV, cos=TABLE, sin=TABLE), ShapeError, r"needs \(10, 4\)"),
    "tables": (lambda: ops.qk_norm_rope(QKV, cos=TABLE, sin=TABLE[None]), ShapeError, "must be equal"),
    "qk_weight": (lambda: ops.qk_norm_rope(QKV, q_weight=torch.ones(4)), ShapeError, r"q_weight has shape \(4,\)"),
    "no_norm": (lambda: ops.qk_norm_rope(QKV, k_weight=torch.ones(8), eps=None), LdmfastError, "no norm"),
    "no_context": (lambda: ops.qk_norm_rope(QKV, context_q_weight=torch.ones(8)), LdmfastError, "no context"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)

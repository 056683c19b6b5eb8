"""Arguments of a wrong kind, device or dtype: one line of ours, whoever noticed them, and no memory nobody wrote."""

from __future__ import annotations

import pytest
import torch

from ldmfast import ops
from ldmfast.errors import DeviceError, LdmfastError

X, Q = torch.randn(2, 8, 4, 4), torch.randn(2, 5, 4, 8)
TABLE = torch.ones(3, 2, dtype=torch.float64)
W8 = torch.randint(-9, 9, (3, 8, 1, 1), dtype=torch.int8)
CONV = {"weight": ops.pack_weight(W8), "weight_scale": torch.ones(3), "weight_sums": W8.flatten(1).sum(1).int(),
        "scale": None, "zero_point": None, "out_channels": 3, "kernel": 1, "padding": 0}

WRONG = {
    "number of groups": (lambda: ops.group_norm_silu(X, None), "group_norm_silu: num_groups is None, needs int"),
    "text for a number": (lambda: ops.attention(Q, Q, Q, block_size="2"), "block_size is '2', needs int"),
    "beyond 64 bits": (lambda: ops.quantize(X, pad=2**70), "pad is 1180591620717411303424, needs int"),
    "a list": (lambda: ops.geglu(X.tolist()), "geglu: x is list, needs Tensor"),
    "an array": (lambda: ops.rms_norm(X, X[0, 0, 0].numpy()), "weight is ndarray, needs Tensor | None"),
    "one tensor for a list": (lambda: ops.lincomb(TABLE, 1, 3), "inputs is 3, needs Sequence[Tensor]"),
    "row a fraction": (lambda: ops.lincomb(TABLE, 1.5, [X, X]), "row is 1.5, needs Tensor | int"),
    "integers": (lambda: ops.rms_norm(torch.ones(2, 4, dtype=torch.int64)), "rms_norm: x is torch.int64, needs float"),
    "integer gate": (lambda: ops.gate_residual(Q[0], Q[0], torch.ones(8).int()), "gate is torch.int32, needs float"),
    "fp8 bias, seen by a thread": (lambda: ops.attention(Q, Q, Q, bias=torch.ones(5).to(torch.float8_e4m3fn)),
                                   "attention: bias is torch.float8_e4m3fn, needs float"),
    "codes for a bias": (lambda: ops.conv2d_q8(X, bias=torch.ones(3).byte(), **CONV), "bias is torch.uint8, needs"),
    "sparse": (lambda: ops.geglu(X.to_sparse()), "x has layout torch.sparse_coo, needs a dense tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kind_is_named(name):
    call, text = WRONG[name]
    with pytest.raises(LdmfastError) as caught:
        call()
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [
    lambda: ops.attention(Q, Q.to("meta"), Q), lambda: ops.group_norm_silu(X, 4, weight=torch.ones(8, device="meta")),
    lambda: ops.lincomb(TABLE, 0, [X, X.to("meta")]), lambda: ops.conv2d_q8(X, residual=X[:, :3].to("meta"), **CONV)])
def test_tensors_of_two_devices(call):
    """Of a CPU and a meta tensor the dispatcher runs the op's fake: it gave unwritten memory of the CPU as a result."""
    with pytest.raises(DeviceError, match=r"is on cpu and .* on meta; bring both to one device"):
        call()


def test_other_errors_stay_what_they_are():
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        ops.group_norm_silu(X)
    with pytest.raises(TypeError, match="unexpected keyword"):
        ops.geglu(X, fp8=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_heads_without_depth_is_the_mean_of_the_values(dtype):
    """Scores over no channels are 0; the scale 0 ** -0.5 was a ZeroDivisionError."""
    q, v = Q[..., :0].to(dtype), Q.to(dtype)
    out = ops.attention(q, q, v, causal=True)
    expected = torch.cumsum(v.double(), 1) / torch.arange(1, 6).view(1, 5, 1, 1)
    assert (out.double() - expected).abs().max() < 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_kv_append_can_be_compiled():
    """Whether cache and new share memory is asked by address, and a tracer has none."""
    def step(cache, new):
        ops.kv_append(cache, new, torch.arange(2))
        return cache * 2

    new = torch.randn(1, 2, 3)
    out = torch.compile(step, backend="aot_eager", fullgraph=True)(torch.zeros(1, 4, 3), new)
    assert torch.equal(out[:, :2], 2 * new) and not out[:, 2:].any()

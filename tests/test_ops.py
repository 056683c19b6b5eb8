"""Generated from the rows: every op x case x dtype against the float64 reference, opcheck, fuzz, bad input, and every
instruction-set level this machine has."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmfast import ops
from ldmfast.errors import DeviceError, LdmfastError, ShapeError
from ldmfast.ops import _load
from ldmfast.ops._op import case as make_case
from ldmfast.ops._op import memory_format, place

sys.path.insert(0, str(Path(__file__).parent))
import parity

# the package's attributes of these names are the functions
conv2d, conv2d_q8, pack_weight = (importlib.import_module(f"ldmfast.ops.{n}") for n in
                                  ("conv2d", "conv2d_q8", "pack_weight"))

ROWS = list(ops.ROWS.values())
CASES = [(row, case) for row in ROWS for case in parity.small_cases(row)]
IDS = [f"{row.name}-{case.name}" for row, case in CASES]


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("row", "case"), CASES, ids=IDS)
def test_live_kernel_is_exact(row, case, dtype):
    assert parity.failure(row, case, dtype) == ""


@pytest.mark.parametrize("dtype", parity.DTYPES[:3], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_reference_is_exact_enough_to_be_the_fallback(row, dtype):
    for case in parity.small_cases(row):
        if "network" not in case.tags:
            assert parity.failure(row, case, dtype, run=row.reference) == "", case.name


@pytest.mark.parametrize("level", (_load.host_module().cpu_levels() if _load.host_module() else []))
def test_every_level_of_this_machine_is_exact(level):
    env = {**os.environ, "LDMFAST_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, parity.__file__], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "live: cpp" in done.stdout


@pytest.mark.parametrize(("name", "text"), [("pentium", "is not a level"), ("neon,avx2", "is not a level")])
def test_unknown_level_is_named(name, text):
    done = subprocess.run([sys.executable, "-c", "import ldmfast.ops"], env={**os.environ, "LDMFAST_CPU_ISA": name},
                          capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert text in done.stderr.splitlines()[-1] and name in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("row", "case"), [(r, c) for r, c in CASES if "network" not in c.tags],
                         ids=[i for i, (r, c) in zip(IDS, CASES) if "network" not in c.tags])
def test_opcheck(row, case):
    """Schema, registration and fake, channels-last cases included: a fake that forgets the layout passes on NCHW."""
    torch.library.opcheck(row.overload, case.args(torch.float32),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_opcheck_traced_with_dynamic_shapes(row):
    case = next(c for c in parity.small_cases(row) if not c.tags & {"network", "empty"})
    torch.library.opcheck(row.overload, case.args(torch.float32), test_utils="test_aot_dispatch_dynamic")


def same(one, other) -> bool:
    pairs = zip(one, other) if isinstance(one, tuple) else [(one, other)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_threads_do_not_change_a_bit(row, dtype):
    before = torch.get_num_threads()
    try:
        for case in parity.small_cases(row):
            args = case.args(dtype)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                out = row.overload(*args)
                results.append(args[0].clone() if row.writes else out)
            assert all(same(results[0], other) for other in results[1:]), case.name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_batch_does_not_change_a_picture(dtype):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 48, 17, 9, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    q, k, v = (torch.randn(3, 75, 4, 40, generator=g).to(dtype) for _ in range(3))
    tokens = torch.randn(3, 31, 80, generator=g).to(dtype)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(ops.group_norm_silu(x, 12)[one], ops.group_norm_silu(x[one], 12))
        assert torch.equal(ops.attention(q, k, v)[one], ops.attention(q[one], k[one], v[one]))
        assert torch.equal(ops.layer_norm_modulate(tokens)[one], ops.layer_norm_modulate(tokens[one]))
        assert torch.equal(ops.geglu(tokens)[one], ops.geglu(tokens[one]))
        weight = ops.pack_weight(torch.randn(40, 48, 3, 3, generator=torch.Generator().manual_seed(i)).to(dtype))
        assert torch.equal(ops.conv2d(x, weight, out_channels=40)[one], ops.conv2d(x[one], weight, out_channels=40))


def fuzz(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.too_slow])


LAYOUTS = st.sampled_from(["contiguous", "channels_last", "view", "slice"])
TYPES = st.sampled_from(parity.DTYPES)
SIZE = st.integers(0, 9)


def holds(row: str, make, dtype: torch.dtype) -> None:
    assert parity.failure(ops.ROWS[row], make_case("fuzz", "", make), dtype) == ""


@fuzz(40)
@given(SIZE, st.integers(1, 5), st.integers(1, 9), SIZE, SIZE, LAYOUTS, st.booleans(), st.booleans(), TYPES)
def test_fuzz_group_norm_silu(n, groups, width, h, w, layout, shift, silu, dtype):
    if width * h * w < 2:  # one number a group: torch's own group_norm, the bound, refuses
        return
    c = groups * width
    holds("group_norm_silu", lambda d: (d.normal(n, c, h, w, layout=layout, offset=0.5),
                                        d.normal(n, c) if shift else None, groups, d.normal(c, offset=1.0),
                                        None, 1e-5, silu), dtype)


@fuzz(40)
@given(SIZE, SIZE, st.integers(1, 70), st.booleans(), st.booleans(), TYPES)
def test_fuzz_layer_norm_modulate(n, tokens, c, modulated, affine, dtype):
    holds("layer_norm_modulate", lambda d: (
        d.normal(n, tokens, c), d.normal(n, c) if modulated else None, d.normal(1, c) if modulated else None,
        d.normal(c) if affine else None, None, 1e-5), dtype)


@fuzz(30)
@given(st.lists(st.integers(0, 6), max_size=3), st.integers(0, 40), TYPES)
def test_fuzz_geglu(lead, columns, dtype):
    holds("geglu", lambda d: (d.normal(*lead, 2 * columns, scale=3.0),), dtype)


@fuzz(40)
@given(SIZE, st.integers(1, 5), st.integers(1, 9), SIZE, SIZE, LAYOUTS, st.booleans(), st.booleans(), st.integers(0, 2),
       TYPES)
def test_fuzz_group_norm_silu_q8(n, groups, width, h, w, layout, shift, silu, pad, dtype):
    if width * h * w < 2:
        return
    c = groups * width
    holds("group_norm_silu_q8", lambda d: (d.normal(n, c, h, w, layout=layout, offset=0.5),
                                           d.normal(n, c) if shift else None, groups, d.normal(c, offset=1.0),
                                           None, 1e-5, silu, pad), dtype)


@fuzz(40)
@given(SIZE, SIZE, st.integers(1, 70), st.booleans(), st.booleans(), TYPES)
def test_fuzz_layer_norm_modulate_q8(n, tokens, c, modulated, affine, dtype):
    holds("layer_norm_modulate_q8", lambda d: (
        d.normal(n, tokens, c), d.normal(n, c) if modulated else None, d.normal(1, c) if modulated else None,
        d.normal(c) if affine else None, None, 1e-5), dtype)


@fuzz(40)
@given(st.lists(st.integers(0, 6), max_size=3), st.integers(0, 40), st.sampled_from([0.0, 0.3, 3.0]), TYPES)
def test_fuzz_geglu_q8(lead, columns, scale, dtype):
    holds("geglu_q8", lambda d: (d.normal(*lead, 2 * columns, scale=scale),), dtype)


@fuzz(40)
@given(SIZE, SIZE, SIZE, SIZE, LAYOUTS, st.integers(0, 3), st.sampled_from([-5.0, 0.0, 5.0]), TYPES)
def test_fuzz_quantize(n, c, h, w, layout, pad, offset, dtype):
    holds("quantize", lambda d: (d.normal(n, c, h, w, layout=layout, offset=offset), pad), dtype)


CONVOLUTIONS = st.tuples(
    st.integers(0, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.booleans(), st.booleans(), LAYOUTS, TYPES)


def fuzz_conv(row, n, c, out, h, w, kernel, stride, padding, upsample, residual, layout, dtype) -> None:
    sizes = [conv2d.out_size(s, kernel, stride, padding, upsample) for s in (h, w)]
    if min(sizes) < 1:
        return

    def whole(d, *shape, layout="contiguous"):  # numbers whose products and sums are exact: only the result is rounded
        return place(d.normal(*shape, scale=2.0).round(), layout)

    def make(d):
        more = whole(d, n, out, *sizes, layout=layout) if residual else None
        if row == "conv2d":
            head = whole(d, n, c, h, w, layout=layout), pack_weight.reference(whole(d, out, c, kernel, kernel))
        else:
            head = (*conv2d_q8.draw_codes(d, n, c, h, w, layout=layout),
                    *conv2d_q8.draw_weight(d, out, c, kernel, kernel))
        return (*head, whole(d, out), more, out, kernel, stride, padding, upsample)

    holds(row, make, dtype)


@fuzz(60)
@given(CONVOLUTIONS)
def test_fuzz_conv2d(convolution):
    fuzz_conv("conv2d", *convolution)


@fuzz(60)
@given(CONVOLUTIONS)
def test_fuzz_conv2d_q8(convolution):
    fuzz_conv("conv2d_q8", *convolution)


@fuzz(20)
@given(st.integers(0, 70), st.integers(1, 70), st.integers(1, 3), TYPES)
def test_fuzz_pack_weight(outputs, channels, kernel, dtype):
    holds("pack_weight", lambda d: (d.normal(outputs, channels, kernel, kernel),), dtype)
    weight = torch.randn(outputs, channels, kernel, kernel).to(dtype)
    assert torch.equal(pack_weight.image_weight(ops.pack_weight(weight), outputs, channels), weight)


@fuzz(30)
@given(SIZE, SIZE, SIZE, SIZE, LAYOUTS, TYPES)
def test_fuzz_upsample2x(n, c, h, w, layout, dtype):
    holds("upsample2x", lambda d: (d.normal(n, c, h, w, layout=layout),), dtype)


@fuzz(30)
@given(st.lists(st.integers(0, 30), max_size=3), st.integers(1, 7), st.integers(0, 2), TYPES)
def test_fuzz_lincomb(shape, n, row, dtype):
    holds("lincomb", lambda d: (d.normal(3, n, dtype=torch.float64), torch.tensor(row),
                                [d.normal(*shape) for _ in range(n)]), dtype)


@fuzz(60)
@given(st.integers(0, 3), st.integers(0, 80), st.integers(0, 300), st.integers(1, 3), st.integers(1, 2),
       st.integers(1, 90), st.booleans(), st.integers(1, 20), st.booleans(), TYPES)
def test_fuzz_attention(b, queries, keys, kv_heads, repeat, depth, causal, block, biased, dtype):
    heads = kv_heads * repeat
    holds("attention", lambda d: (
        d.normal(b, queries, heads, depth), d.normal(b, keys, kv_heads, depth), d.normal(b, keys, kv_heads, depth),
        d.normal(1, heads, queries, 1) if biased else None, depth ** -0.5, causal, block), dtype)


def test_a_fully_masked_row_is_zero_and_its_neighbours_are_not():
    q = torch.randn(1, 3, 1, 8)
    bias = torch.zeros(1, 1, 3, 3)
    bias[:, :, 1] = float("-inf")
    out = ops.attention(q, q, q, bias=bias)
    assert torch.equal(out[0, 1], torch.zeros(1, 8))
    assert out[0, 0].abs().min() > 0


def test_nan_is_not_swallowed():
    q = torch.randn(1, 5, 1, 8)
    q[0, 2, 0, 3] = float("nan")
    assert torch.isnan(ops.attention(q, torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8))[0, 2]).all()
    x = torch.randn(1, 4, 3, 3)
    x[0, 0, 0, 0] = float("nan")
    assert torch.isnan(ops.group_norm_silu(x, 2)[0, :2]).all()
    assert torch.isnan(ops.geglu(torch.tensor([1.0, float("nan")]))).all()


Q8_CALLS = {
    "quantize": lambda x: ops.quantize(x, pad=1),
    "group_norm_silu_q8": lambda x: ops.group_norm_silu_q8(x, 2, pad=1),
    "layer_norm_modulate_q8": ops.layer_norm_modulate_q8,
    "geglu_q8": ops.geglu_q8,
}


@pytest.mark.parametrize("kernel", ["live", "reference"])
@pytest.mark.parametrize("place_of_it", [0, 37, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", Q8_CALLS)
def test_codes_of_what_is_not_finite_decode_to_nan(name, value, place_of_it, kernel, monkeypatch):
    """A code cannot be NaN: the scale has to be, or a broken picture would look like a plausible one."""
    if kernel == "reference":
        monkeypatch.setattr(sys.modules[f"ldmfast.ops.{name}"], "_call", ops.ROWS[name].reference)
    x = torch.randn(2, 6, 5, 4)
    x.view(-1)[place_of_it] = value
    q, scale, zero_point = Q8_CALLS[name](x)
    assert torch.isnan(scale).all() and int(zero_point) == 0 and int(q.max()) == 0
    assert torch.isnan((q.int() - zero_point) * scale).all()


@pytest.mark.parametrize("name", Q8_CALLS)
def test_codes_of_zeros(name):
    """gain, gate and image of zeros: scale 1 and zero point 0, not a division by zero."""
    q, scale, zero_point = Q8_CALLS[name](torch.zeros(2, 6, 5, 4))
    assert (float(scale), int(zero_point), int(q.max())) == (1.0, 0, 0)


def test_convolution_of_the_codes_needs_no_padding_and_a_constant():
    """What the border and the zero point are for: conv(codes, no padding) - zero_point * sum(weights) is, times scale,
    the convolution padded with zeros of the decoded image."""
    x = torch.randn(2, 6, 7, 5)
    weight = torch.randn(4, 6, 3, 3).double()
    q, scale, zero_point = ops.quantize(x, pad=1)
    ours = torch.conv2d(q.double(), weight) - zero_point * weight.sum((1, 2, 3)).view(-1, 1, 1)
    decoded = (q[:, :, 1:-1, 1:-1].double() - zero_point) * scale.double()
    assert (ours * scale.double() - torch.conv2d(decoded, weight, padding=1)).abs().max() < 1e-9
    assert (decoded - x).abs().max() <= 0.51 * float(scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_codes_of_an_image_are_channels_last(layout):
    x = place(torch.randn(2, 8, 5, 7), layout)
    for q, *_ in (ops.quantize(x, pad=1), ops.quantize(x), ops.group_norm_silu_q8(x, 4)):
        assert memory_format(q) == torch.channels_last


def test_range_of_geglu_is_exact_where_its_bound_is_loose():
    """Far below zero gelu is 0, not the bound -0.17: a large value there must not widen the range."""
    x = torch.zeros(3, 64)
    x[:, :32], x[:, 32:] = 100.0, -8.0
    x[1, 3], x[1, 35] = 2.0, 1.0
    _, scale, _ = ops.geglu_q8(x)
    y = ops.geglu(x.double())
    assert float(scale) * 255 == pytest.approx(float(y.max() - min(y.min(), 0)), rel=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_is_kept(layout):
    x = place(torch.randn(2, 8, 5, 7), layout)
    one = torch.ones(1, 1, dtype=torch.float64)
    for out in (ops.group_norm_silu(x, 4), ops.upsample2x(x), ops.lincomb(one, 0, [x])):
        assert memory_format(out) == memory_format(x)


def test_lincomb_takes_its_row_as_number_or_tensor():
    table = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    inputs = [torch.full((3,), 2.0), torch.full((3,), 5.0)]
    for row, value in ((0, 12.0), (1, 6.0)):
        assert torch.equal(ops.lincomb(table, row, inputs), torch.full((3,), value))
        assert torch.equal(ops.lincomb(table, torch.tensor(row), inputs), torch.full((3,), value))


X, T, TABLE = torch.randn(2, 8, 4, 4), torch.randn(2, 5, 8), torch.ones(3, 2, dtype=torch.float64)
Q = torch.randn(2, 5, 4, 8)
BAD = {
    "groups": (lambda: ops.group_norm_silu(X, 3), ShapeError, "8 channels do not split into 3 groups"),
    "weight": (lambda: ops.group_norm_silu(X, 4, torch.ones(7)), ShapeError, r"weight has shape \(7,\)"),
    "shift": (lambda: ops.group_norm_silu(X, 4, shift=torch.ones(1, 8)), ShapeError, r"needs \(2, 8\)"),
    "one_dim": (lambda: ops.group_norm_silu(torch.ones(3), 1), ShapeError, "1 dimensions"),
    "scale": (lambda: ops.layer_norm_modulate(T, torch.ones(3, 8)), ShapeError, r"scale has shape \(3, 8\)"),
    "ln_bias": (lambda: ops.layer_norm_modulate(T, bias=torch.ones(2)), ShapeError, r"bias has shape \(2,\)"),
    "odd": (lambda: ops.geglu(torch.ones(2, 5)), ShapeError, "even last dimension"),
    "no_pixels": (lambda: ops.conv2d(torch.ones(1, 4, 0, 5), ops.pack_weight(torch.ones(3, 4, 3, 3)), out_channels=3,
                                     padding=2), ShapeError, "an image of 0 x 5 pixels"),
    "q8_groups": (lambda: ops.group_norm_silu_q8(X, 3), ShapeError, "group_norm_silu_q8: 8 channels do not split"),
    "q8_scale": (lambda: ops.layer_norm_modulate_q8(T, torch.ones(3, 8)), ShapeError, r"_q8: scale has shape \(3, 8\)"),
    "q8_odd": (lambda: ops.geglu_q8(torch.ones(2, 5)), ShapeError, "geglu_q8: x has shape .* even last dimension"),
    "pad_rank": (lambda: ops.quantize(T, pad=1), ShapeError, r"quantize: pad is 1 for x of shape \(2, 5, 8\)"),
    "pad_below": (lambda: ops.group_norm_silu_q8(X, 4, pad=-1), ShapeError, "pad is -1 for x of shape"),
    "rank": (lambda: ops.upsample2x(T), ShapeError, "needs \\(N, C, H, W\\)"),
    "columns": (lambda: ops.lincomb(TABLE, 0, [X]), ShapeError, r"needs \(rows, 1\)"),
    "row": (lambda: ops.lincomb(TABLE, 3, [X, X]), LdmfastError, "row 3 is not in the table's 0..2"),
    "row_dtype": (lambda: ops.lincomb(TABLE, torch.tensor(1.0), [X, X]), ShapeError, "needs one int64"),
    "table_dtype": (lambda: ops.lincomb(TABLE.float(), 0, [X, X]), LdmfastError, "needs torch.float64"),
    "unequal": (lambda: ops.lincomb(TABLE, 0, [X, X[:1]]), ShapeError, "they must be equal"),
    "device": (lambda: ops.lincomb(TABLE.to("meta"), 0, [X, X]), DeviceError, "move the table"),
    "heads": (lambda: ops.attention(Q, Q[:, :, :3], Q[:, :, :3]), ShapeError, "3 key heads do not divide 4"),
    "depth": (lambda: ops.attention(Q, Q[..., :4], Q), ShapeError, "do not fit q"),
    "dtypes": (lambda: ops.attention(Q, Q.half(), Q.half()), LdmfastError, "one dtype"),
    "block": (lambda: ops.attention(Q, Q, Q, causal=True, block_size=0), LdmfastError, "block_size is 0"),
    "bias": (lambda: ops.attention(Q, Q, Q, bias=torch.zeros(3, 5)), ShapeError, "broadcasts to"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gates_far_from_zero(dtype):
    """SiLU and tanh-GELU of what fp16 overflows to, and of numbers whose exponential does."""
    gate = torch.tensor([float("inf"), 6e4, 30.0, -30.0, -6e4] * 7, dtype=dtype)
    x = torch.cat([torch.ones_like(gate), gate])[None]
    for op, function in ((ops.swiglu, torch.nn.functional.silu),
                         (ops.geglu_tanh, lambda g: torch.nn.functional.gelu(g, approximate="tanh"))):
        torch.testing.assert_close(op(x)[0].double(), function(gate.double()), rtol=2**-7, atol=1e-6)

"""Linear, GatedLinear and Conv2d: matrix products are the library's, oneDNN's on a CPU, cuBLAS's and cuDNN's elsewhere;
but on a CPU with tiles (AMX) convolutions, linears with many inputs and those with GEGLU or GELU in bf16 and 8 bits are
our own, which are faster there: ops.conv2d, ops.linear_geglu, ops.linear_gelu_tanh and their q8 forms.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._load import level
from ..ops.linear_geglu import plain_weight, side_by_side
from ..ops.pack_weight import image_weight
from .direct import Direct
from .onednn import INT8_SCHEMAS, SCHEMAS, Packed, as_expected
from .quantized import Quantized
from .rowwise import RowCodes, RowwiseWeight, rows_to_int8, sums_of_rows

ONEDNN = as_expected(SCHEMAS, "products run through torch.nn.functional, which is slower")
ONEDNN_INT8 = as_expected(INT8_SCHEMAS, "int8 products run as floating-point ones, which is slower")
# below AVX-512 oneDNN writes an 8-bit product as bf16 through a reference kernel, forty times slower
_LIMIT = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
_WRITES_BF16 = torch.cpu._is_avx512_supported() and _LIMIT not in ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")
_DTYPES = {torch.float32} | ({torch.bfloat16} if ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())

# whether products are ours where there are any (docs/performance.md, "Our own products")
OWN = ops.CPU_LIBRARY.loaded and level() == "amx"


def _onednn(x: Tensor) -> bool:
    return ONEDNN and x.device.type == "cpu" and x.dtype in _DTYPES


def packable(weight: Tensor) -> bool:
    """Whether a weight of this device and dtype can take oneDNN's own layout."""
    return _onednn(weight) and not weight.is_mkldnn and weight.numel() > 0


def _packs_own(weight: Tensor, least: tuple[int, int] = (1, 1)) -> bool:
    """Whether a plain weight of at least ``least`` outputs and inputs takes the order of our own products."""
    return (OWN and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.numel() > 0
            and not weight.is_mkldnn and weight.ndim in (2, 4) and _at_least(weight, least))


def _at_least(weight: Tensor, least: tuple[int, int]) -> bool:
    return weight.shape[0] >= least[0] and weight.shape[1] >= least[1]


class Int8Weight(nn.Module):
    """Weight of a W8A8 product in the layout of the kernel; nothing of higher precision is kept.

    values: int8 (out, in) or (out, in, kh, kw). scale: fp32 (out,). bias: (out,) or None.
    """

    scale: Tensor
    bias: Tensor | None
    sums: Tensor
    zeros: Tensor

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None, layer: nn.Module):
        super().__init__()
        self.shape = tuple(values.shape)
        self.gated = isinstance(layer, GatedLinear)
        conv = layer if isinstance(layer, Conv2d) else None
        self.own = OWN and values.device.type == "cpu" and values.numel() > 0
        self.packed = ONEDNN_INT8 and not self.own and values.device.type == "cpu"
        self.layout: Packed | None = None
        # what a zero point of 1 adds to each output
        sums = sums_of_rows(values)
        if self.own:
            self.values = ops.pack_weight(side_by_side(values) if self.gated else values)
        elif self.packed and conv is not None:
            stride, dilation, groups = conv.stride, conv.dilation, conv.groups
            self.layout = Packed(values, lambda w, shape: torch.ops.onednn.qconv_prepack(
                w, scale, 1.0, 0, stride, (0, 0), dilation, groups, shape))
        elif self.packed:
            self.values = torch.ops.onednn.qlinear_prepack(values, None)
        else:
            self.values = values
        self.register_buffer("scale", scale)
        # the outputs of our own have the bias's dtype
        kept = torch.bfloat16 if self.own else torch.float32
        self.register_buffer("bias", None if bias is None else bias.detach().to(kept))
        self.register_buffer("sums", sums)
        self.register_buffer("zeros", torch.zeros(len(scale), dtype=torch.int64, device=scale.device))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that the values stand for."""
        values = self.values if self.layout is None else self.layout.dense()
        if self.packed and self.layout is None:
            values = values.to_dense().T
        if self.own and self.gated:
            values = plain_weight(values, self.shape[0] // 2, self.shape[1])
        elif self.own:
            values = image_weight(values, *self.shape[:2]).reshape(self.shape)
        return (values.float() * self.scale.view(-1, *[1] * (values.ndim - 1))).to(dtype)


def codes_or_numbers(x: Tensor | Quantized, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ops.conv2d_q8 takes for a result of ``dtype``: it makes codes itself of numbers of that dtype only."""
    if isinstance(x, Quantized):
        return x
    return (x, None, None) if x.dtype == dtype else ops.quantize(x)


def _column(x: Tensor) -> Tensor:
    """Rows (..., C) as an image (1, C, rows, 1), channels-last, which is how our own products read them."""
    return x.reshape(1, x.shape[:-1].numel(), 1, x.shape[-1]).permute(0, 3, 1, 2)


def pack_linear(weight: Tensor, least: tuple[int, int]) -> Tensor:
    """A plain weight (out, in) in the order of the product that takes it: our own if it is as large as ``least``."""
    weight = weight.detach()
    if _packs_own(weight, least):
        return ops.pack_weight(weight)
    return torch.ops.mkldnn._reorder_linear_weight(weight, None) if packable(weight) else weight


def plain_linear(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weight (out, in) that pack_linear was given."""
    weight = weight.detach()
    if weight.ndim == 7:
        return image_weight(weight, *shape).flatten(1)
    return weight.to_dense() if weight.is_mkldnn else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, outputs: int = 0) -> Tensor:
    """x W^T + b (+ residual). weight: plain, or from pack_linear, for ``outputs`` outputs."""
    if weight.ndim == 7:
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], outputs)
        more = None if residual is None else _column(residual)
        y = ops.conv2d(_column(x), weight, bias, more, out_channels=outputs, kernel=1, padding=0)
        return y.permute(0, 2, 3, 1).view(*x.shape[:-1], outputs)
    if not _onednn(x):
        out = F.linear(x, weight, bias)
        return out if residual is None else out.add_(residual)
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


class Linear(Direct, nn.Linear):
    """x W^T + b (+ residual). W is an ordinary parameter until ``pack`` or ``quantize``."""

    int8: Int8Weight | None
    rowwise: RowwiseWeight | None  # the form of 8 bits that takes a floating x
    row_form = ""  # which codes with a scale a row it takes: of rowwise.FORMS, or none
    border = 0
    lora: Any = None  # a loras.Side: (x, residual) -> residual with what adapters add to it
    # outputs and inputs from which our own product is faster (docs/performance.md, "Our own products")
    own_from: ClassVar[tuple[int, int]] = (640, 1280)

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.int8 = self.rowwise = None

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where it draws nothing, and takes longer than all else
            super().reset_parameters()

    def forward(self, x: Tensor | Quantized | RowCodes, residual: Tensor | None = None) -> Tensor:
        """x: (..., in), floating, or 8-bit for a layer with ``int8`` or ``rowwise``; residual: (..., out)."""
        if self.lora is not None:
            residual = self.lora(x.dense() if isinstance(x, RowCodes) else x, residual)
        if self.rowwise is not None:
            return self.rowwise(x, residual)
        x = x.dense() if isinstance(x, RowCodes) else x  # made for another layer of the same input
        if self.int8 is not None:
            return self._int8(self.int8, x, residual)
        assert isinstance(x, Tensor)
        return linear(x, self.weight, self.bias, residual, self.out_features)

    def _int8(self, w: Int8Weight, x: Tensor | Quantized, residual: Tensor | None) -> Tensor:
        dtype = torch.bfloat16 if residual is None else residual.dtype
        values, step, zero = codes_or_numbers(x, dtype) if w.own else (None, None, None)
        if values is not None and values.numel() > 0:
            more = None if residual is None else _column(residual)
            y = ops.conv2d_q8(_column(values), step, zero, w.values, w.scale, w.sums, w.bias, more,
                              out_channels=w.shape[0], kernel=1, padding=0)
            return y.permute(0, 2, 3, 1).view(*values.shape[:-1], w.shape[0])
        if isinstance(x, Tensor):
            x = Quantized(*ops.quantize(x))
        if not w.packed and not w.own:
            out = F.linear(x.dense(torch.float32), w.dense(torch.float32), w.bias).to(dtype)
            return out if residual is None else out.add_(residual)
        if x.values.numel() == 0:
            return x.scale.new_empty((*x.values.shape[:-1], self.out_features), dtype=dtype)
        q = torch.ops.onednn.qlinear_pointwise
        if residual is None or not _WRITES_BF16:
            kind = dtype if _WRITES_BF16 else torch.float32
            out = q.tensor(*x, w.values, w.scale, w.zeros, w.bias, 1.0, 0, kind, "none", [], "")
            return (out if residual is None else out.add_(residual)).to(dtype)
        return q.binary_tensor(*x, w.values, w.scale, w.zeros, residual, w.bias, 1.0, 0, dtype, 1.0, 0, "add", 1.0,
                               "none", [], "")

    def quantize_rows(self, form: str) -> None:
        """Turns into a product of 8 bits with a scale for each row, of its plain weight. form: of rowwise.FORMS."""
        self.rowwise, self.row_form = RowwiseWeight(self.weight, self.bias, form), form
        self.register_parameter("weight", None)

    def pack(self) -> None:
        """Brings the weight into the layout of its product, once; the plain one is let go."""
        if self.int8 is None and not self.own and (packable(self.weight) or _packs_own(self.weight, self.own_from)):
            self.weight = _fixed(pack_linear(self.weight, self.own_from))

    @property
    def own(self) -> bool:
        """Whether ``weight`` is packed for a product of our own."""
        return self.weight is not None and self.weight.ndim == 7

    def dense(self) -> Tensor:
        """The weight (out, in), plain again if it was packed."""
        if self.rowwise is not None:
            return self.rowwise.dense(torch.float32)
        return plain_linear(self.weight, (self.out_features, self.in_features))

    def quantize(self, values: Tensor | None = None, scale: Tensor | None = None, keep: bool = False) -> None:
        """Turns into a W8A8 layer: of its own plain weight, or of stored values and scales. keep: the weight stays,
        too, for a network that uses the layer in both ways (``Model.with_plan``)."""
        if values is None or scale is None:
            values, scale = rows_to_int8(self.weight)
        if not keep:
            self.register_parameter("weight", None)
        self.int8 = Int8Weight(values, scale, self.bias, self)

    @classmethod
    def join(cls, layers: Sequence[Linear]) -> Linear:
        """One layer whose outputs are those of the given layers, side by side."""
        with torch.device("meta"):
            whole = cls(layers[0].in_features, sum(m.out_features for m in layers), layers[0].bias is not None)
        whole.weight = _fixed(torch.cat([m.weight.detach() for m in layers]))
        if whole.bias is not None:
            whole.bias = _fixed(torch.cat([m.bias.detach() for m in layers]))
        return whole


def _gated(y: Tensor, codes: bool | str) -> Any:
    """GEGLU of values before gates; codes: as in GatedLinear."""
    if isinstance(codes, str) and codes:
        return RowCodes(*ops.geglu_rows(y, fp8=codes == "fp8"), y.dtype)
    return Quantized(*ops.geglu_q8(y)) if codes else ops.geglu(y)


class GatedLinear(Linear):
    """GEGLU of a linear: of its outputs x W^T + b the first half times GELU of the second (Shazeer 2020)."""

    own_from: ClassVar[tuple[int, int]] = (1, 1)

    def forward(self, x: Any, *, codes: bool | str = False) -> Any:  # type: ignore[override]
        """x: (..., in) -> (..., out_features / 2). codes: 8 bits, where the layer that follows takes them and they cost
        less than it would pay itself; of rowwise.FORMS for one that takes such."""
        w, inner = self.int8, self.out_features // 2
        x = x.dense() if isinstance(x, RowCodes) and self.rowwise is None else x
        if self.lora is not None and (self.own if w is None else w.own):
            return _gated(self.lora.values_gates(self, x), codes)
        if w is not None and w.own:
            x = Quantized(*ops.quantize(x)) if isinstance(x, Tensor) else x
            assert isinstance(x, Quantized)
            return ops.linear_geglu_q8(*x, w.values, w.scale, w.sums, w.bias, out_features=inner)
        if w is None and self.own:
            assert isinstance(x, Tensor)
            return ops.linear_geglu(x, self.weight, self.bias, out_features=inner)
        return _gated(super().forward(x), codes)

    def pack(self) -> None:
        weight = self.weight.detach()
        if _packs_own(weight):
            self.weight = _fixed(ops.pack_weight(side_by_side(weight)))
        elif not self.own:
            super().pack()

    def dense(self) -> Tensor:
        if self.own:
            return plain_weight(self.weight.detach(), self.out_features // 2, self.in_features)
        return super().dense()


class Conv2d(Direct, nn.Conv2d):
    """Convolution of (N, C, H, W), channels-last, plus bias (and residual), padded with zeros."""

    int8: Int8Weight | None
    lora: Any = None  # as in Linear, with upsample

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
                 bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.int8 = None
        self.layout: Packed | None = None

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor | Quantized, residual: Tensor | None = None, upsample: bool = False) -> Tensor:
        """x: (N, in, H, W), floating, or 8-bit with its padding (``border``) for a layer with ``int8``; residual: like
        the output. upsample: x is doubled in size first, by nearest neighbours."""
        if self.lora is not None:
            residual = self.lora(x, residual, upsample)
        if self.int8 is not None:
            return self._int8(self.int8, x, residual, upsample)
        assert isinstance(x, Tensor)
        if self.own:
            return ops.conv2d(x, self.weight, self.bias, residual, upsample=upsample, **self.sizes())
        x = ops.upsample2x(x) if upsample else x
        weight = self.weight if self.layout is None else self.layout.at(x)
        if not _onednn(x):
            weight = weight.to_dense() if weight.is_mkldnn else weight
            out = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            return out if residual is None else out.add_(residual)
        shape = (self.padding, self.stride, self.dilation, self.groups)
        conv = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return conv(x, weight, self.bias, *shape, "none", [], "")
        return conv.binary(x, residual, weight, self.bias, *shape, "add", 1.0, None, [], None)

    def _int8(self, w: Int8Weight, x: Tensor | Quantized, residual: Tensor | None, upsample: bool) -> Tensor:
        if w.own:
            values, step, zero = codes_or_numbers(x, torch.bfloat16 if residual is None else residual.dtype)
            return ops.conv2d_q8(values, step, zero, w.values, w.scale, w.sums, w.bias, residual, upsample=upsample,
                                 **self.sizes())
        if isinstance(x, Tensor):
            x = Quantized(*ops.quantize(ops.upsample2x(x) if upsample else x, pad=self.border))
        if w.layout is None or x.values.numel() == 0:
            out = F.conv2d(x.dense(torch.float32), w.dense(torch.float32), w.bias, self.stride, 0, self.dilation,
                           self.groups).to(torch.bfloat16)
        else:
            # a zero point inside oneDNN's convolution costs a factor, so the bias takes its part; the border of the
            # picture already holds it
            bias = (w.sums * w.scale * (x.scale * x.zero_point)).neg_()
            bias = bias if w.bias is None else bias.add_(w.bias)
            out = torch.ops.onednn.qconv_pointwise.tensor(
                x.values, x.scale, torch.zeros_like(x.zero_point), w.layout.at(x.values), w.scale, w.zeros, bias,
                self.stride, (0, 0), self.dilation, self.groups, 1.0, 0,
                torch.bfloat16 if _WRITES_BF16 else torch.float32, "none", [], "").to(torch.bfloat16)
        return out if residual is None else out.add_(residual)

    def sizes(self) -> dict[str, Any]:
        """What the ops of our own take beside tensors."""
        return {"out_channels": self.out_channels, "kernel": self.kernel_size[0], "stride": self.stride[0],
                "padding": int(self.padding[0])}

    @property
    def border(self) -> int:
        """Pixels of padding on each side that an 8-bit input brings along."""
        return 0 if self.int8 is not None and self.int8.own else int(self.padding[0])

    @property
    def own(self) -> bool:
        """Whether ``weight`` is packed for ops.conv2d."""
        return self.weight is not None and self.weight.ndim == 7

    def pack(self) -> None:
        """Brings the weight into the layout of the kernels, once; the plain one is let go."""
        if _packs_own(self.weight):
            self.weight = _fixed(ops.pack_weight(self.weight.detach()))
        if self.own:
            return
        weight = self.weight.detach().contiguous(memory_format=torch.channels_last)  # the best of the plain layouts
        if not packable(weight):
            self.weight = _fixed(weight)
            return
        padding, stride, dilation, groups = self.padding, self.stride, self.dilation, self.groups
        self.layout = Packed(weight, lambda w, shape: torch.ops.mkldnn._reorder_convolution_weight(
            w, padding, stride, dilation, groups, shape))
        self.register_parameter("weight", None)

    def dense(self) -> Tensor:
        """The weight (out, in, kh, kw), plain again if it was packed."""
        if self.own:
            return image_weight(self.weight.detach(), self.out_channels, self.in_channels)
        return self.weight.detach() if self.layout is None else self.layout.dense()

    def quantize(self, values: Tensor | None = None, scale: Tensor | None = None, keep: bool = False) -> None:
        """Turns into a W8A8 layer: of its own plain weight, or of stored values and scales. keep: the weight stays,
        too, for a network that uses the layer in both ways (``Model.with_plan``)."""
        if values is None or scale is None:
            values, scale = rows_to_int8(self.dense())
        if not keep:
            self.register_parameter("weight", None)
            self.layout = None
        self.int8 = Int8Weight(values, scale, self.bias, self)


def _fixed(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)

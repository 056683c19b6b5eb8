"""lincomb: one row of a coefficient table times a list of tensors: every linear solver step."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import DeviceError, LdmfastError, ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, memory_format, nbytes, register, shape_of


def reference(table: Tensor, row: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
    first = inputs[0]
    dtype = accumulator(first)
    index = torch.zeros(1, dtype=torch.int64, device=table.device) if row is None else row.reshape(1)
    coefficients = table.index_select(0, index)[0].to(dtype)
    total = torch.zeros(first.shape, dtype=dtype, device=first.device)
    for coefficient, x in zip(coefficients.unbind(), inputs):
        # where, not a product alone: an unused register may hold anything, and 0 * inf is not 0
        total = total + torch.where(coefficient == 0, 0.0, coefficient * x.to(dtype))
    return torch.empty_like(first, memory_format=memory_format(first)).copy_(total)


def peer(table: Tensor, row: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
    coefficients = table[0 if row is None else int(row)].tolist()
    terms = [c * x for c, x in zip(coefficients, inputs) if c]
    return sum(terms[1:], terms[0]).to(inputs[0].dtype)


def fake(table: Tensor, row: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(inputs[0], memory_format=memory_format(inputs[0]))


def cost(table: Tensor, row: Tensor | None, inputs: Sequence[Tensor]) -> Cost:
    return Cost(flops=2.0 * len(inputs) * inputs[0].numel(), bytes=nbytes(*inputs, inputs[0]))


def cases() -> Iterator[Case]:
    def make(shape: tuple[int, ...], n: int, *, rows: int = 3, row: int | None = 1,
             layout: str = "contiguous", zero: tuple[int, ...] = (), mixed: bool = False):
        def draw(d: Draw) -> tuple:
            table = d.normal(rows, n, dtype=torch.float64)
            dtypes = [torch.float32 if mixed and i else None for i in range(n)]
            inputs = [d.normal(*shape, layout=layout, dtype=dtype) for dtype in dtypes]
            for i in zero:
                table[:, i] = 0
                inputs[i].fill_(float("inf"))
            return table, None if row is None else torch.tensor(row), inputs
        return draw

    cl = "channels_last"
    yield case("sd15_dpmpp", "network", make((2, 4, 64, 64), 4))
    yield case("sdxl_guided", "network channels_last", make((1, 4, 128, 128), 3, layout=cl))
    yield case("video", "network big", make((1, 16, 21, 60, 104), 5))
    yield case("first_row", "", make((2, 4, 8, 8), 3, row=None))
    yield case("one_input", "", make((2, 4, 8, 8), 1, rows=1, row=0))
    yield case("nine_inputs", "", make((1, 4, 8, 8), 9, row=2))
    yield case("unused_inf", "", make((2, 4, 8, 8), 4, zero=(1, 3)))
    yield case("mixed_dtypes", "", make((2, 4, 9, 8), 3, mixed=True))
    yield case("ragged", "ragged", make((3, 5, 61, 7), 3))
    yield case("scalar", "ragged", make((), 2))
    yield case("misaligned", "view", make((3, 37), 3, layout="view"))
    yield case("sliced", "view channels_last", make((3, 4, 5, 7), 3, layout="slice"))
    yield case("no_batch", "empty", make((0, 4, 8, 8), 3))


_call = register(Op("lincomb", "(Tensor table, Tensor? row, Tensor[] inputs) -> Tensor",
                    reference, fake, cases, cost, peer))


@public
def lincomb(table: Tensor, row: Tensor | int, inputs: Sequence[Tensor]) -> Tensor:
    """sum_j table[row, j] * inputs[j], the solver step of every coefficient table (docs/decisions.md).

    table: (rows, n) float64, on the device of the inputs. row: an int, or an int64 tensor with one element on
    that device (read there, never on the host, so that a CUDA graph can advance it; not range checked).
    inputs: n tensors of one shape, floating, dtypes may differ. Output: inputs[0]'s shape, dtype and layout.
    Summed in fp32, in fp64 if inputs[0] is fp64. A tensor whose coefficient is zero is not read.
    Raises ShapeError, DeviceError, or LdmfastError for a table that is not float64 or a row out of range.
    """
    if table.ndim != 2 or table.shape[1] != len(inputs) or not inputs:
        raise ShapeError(f"lincomb: table has shape {shape_of(table)}, needs (rows, {len(inputs)}) with one "
                         "column for each of at least one input")
    if table.dtype != torch.float64:
        raise LdmfastError(f"lincomb: table is {table.dtype}, needs torch.float64")
    first = inputs[0]
    shape = first.shape
    for i, x in enumerate(inputs):
        if x.shape != shape:
            raise ShapeError(f"lincomb: input {i} has shape {shape_of(x)}, input 0 has {shape_of(first)}; "
                             "they must be equal")
    if table.device != first.device:
        raise DeviceError(f"lincomb: table is on {table.device}, inputs are on {first.device}; "
                          "move the table")
    if isinstance(row, Tensor):
        if row.dtype != torch.int64 or row.numel() != 1 or row.device != table.device:
            raise ShapeError(f"lincomb: row is a {row.dtype} tensor of shape {shape_of(row)} on "
                             f"{row.device}, needs one int64 on {table.device}")
        return _call(table, row, inputs)
    if not -1 < row < table.shape[0]:
        raise LdmfastError(f"lincomb: row {row} is not in the table's 0..{table.shape[0] - 1}")
    return _call(table.narrow(0, operator.index(row), 1), None, inputs)

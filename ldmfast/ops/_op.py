"""The row of the op catalogue: what one op is, and how it reaches torch's dispatcher.

A row names no backends. They exist because a file exists: ``csrc/cpu/<op>.cpp``, ``csrc/cuda/<op>.cu``,
``kernels/<op>.py``. The reference is registered for every device and runs where nothing better is loaded.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _load
from ._faults import on_one_device

NAMESPACE = "ldmfast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
ROWS: dict[str, Op] = {}


@dataclass(frozen=True)
class Cost:
    """Least work of one call: floating-point operations, and bytes that must cross memory once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Draw:
    """Draws the tensors of a case: same case and seed, same numbers, whatever the dtype."""

    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0, layout: str = "contiguous",
               dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of the case's dtype.

        layout: "contiguous", "channels_last", "view" (dense, but starts one element into its storage), or
        "slice" (the last dimension is a part of a wider tensor, so rows are not adjacent).
        """
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + offset
        return place(values.to(dtype or self.dtype), layout)


def place(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout (see Draw.normal)."""
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.ndim])
    if layout == "view":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if layout == "slice":
        return torch.cat([x.new_zeros(*x.shape[:-1], 3), x], dim=-1)[..., 3:]
    return x


@dataclass(frozen=True)
class Case:
    """One call of an op. ``make`` returns the schema's arguments; tags say what the case is there for.

    Tags: "network" (a shape of a real model: benchmarks run these), "ragged", "empty", "channels_last",
    "view", and "big" (benchmarks only: the float64 reference would take too long in the tests).
    """

    name: str
    make: Callable[[Draw], tuple[Any, ...]] = field(repr=False)
    tags: frozenset[str] = frozenset()

    def args(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + seed)
        return self.make(Draw(dtype, generator))


def case(name: str, tags: str, make: Callable[[Draw], tuple[Any, ...]]) -> Case:
    return Case(name, make, frozenset(tags.split()))


@dataclass(frozen=True)
class Op:
    """One row. Its functions give one tensor, or a tuple of them if the schema says so, or write into the first.

    ``reference`` is the only oracle; it computes in fp32, or in fp64 when its input is fp64. ``peer`` is what a user
    of torch writes instead, in the tensors' own dtype: its error bounds what a kernel may have, and its time is what
    a benchmark compares with.
    """

    name: str
    schema: str
    reference: Callable[..., Any] = field(repr=False)
    fake: Callable[..., Any] = field(repr=False)
    cases: Callable[[], Iterable[Case]] = field(repr=False)
    cost: Callable[..., Cost] = field(repr=False)
    peer: Callable[..., Any] = field(repr=False)
    cpu_only: bool = False  # no Triton kernel yet: on a GPU the reference runs
    gpu_only: bool = False  # no C++ kernel: it saves GPUs a pass, and on a CPU the reference shows its numbers

    @property
    def overload(self) -> Any:
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def writes(self) -> bool:
        """Whether the op gives nothing and changes its first argument instead."""
        return self.schema.endswith("-> ()")

    def has_kernel(self, device: str) -> bool:
        """Whether something faster than the reference is registered for "cpu" or "cuda"."""
        key = {"cpu": "CPU", "cuda": "CUDA"}[device]
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{self.name}", key)

    def live(self, device: str = "cpu") -> str:
        """The backend that a call on this device runs: "reference", "cpp", "cuda", "triton", or "cuda or triton" where
        it depends on the call."""
        if not self.has_kernel(device):
            return "reference"
        if device == "cpu":
            return "cpp"
        if self.name not in _TRITON:
            return "cuda"
        part = f"{self.name}_cuda"
        if not hasattr(getattr(torch.ops, NAMESPACE), part):
            return "triton"
        built = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{part}", "CUDA")
        return "cuda or triton" if built else "triton"


_TRITON: set[str] = set()


def register(row: Op) -> Any:
    """Defines the op in torch's dispatcher and returns its overload, to be bound once at module level."""
    qualified = f"{NAMESPACE}::{row.name}"
    LIBRARY.define(row.name + row.schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(row.name, row.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, on_one_device(row.name, row.fake), lib=LIBRARY)
    ROWS[row.name] = row
    return row.overload


def register_triton() -> None:
    """Puts the Triton launchers under CUDA where no CUDA C++ kernel was loaded; imports Triton late."""
    if torch.version.cuda is None or not _load.triton_installed():
        return
    for row in ROWS.values():
        if row.has_kernel("cuda") or not _load.kernel_file(row.name).exists():
            continue
        LIBRARY.impl(row.name, _launcher(row.name), "CUDA")
        _TRITON.add(row.name)


def _launcher(name: str) -> Callable[..., Tensor]:
    launch: Callable[..., Tensor] | None = None

    def call(*args: Any) -> Tensor:
        nonlocal launch
        if launch is None:
            launch = _load.kernel_module(name).launch
        return launch(*args)

    return call


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype in which references compute: fp64 for fp64 input, otherwise fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout every op keeps: channels-last if x is dense in that order and not in the ordinary one."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def nbytes(*tensors: Tensor | None) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors if t is not None))


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total

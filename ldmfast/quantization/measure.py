"""Measures what 8 bits cost each layer: signal to quantisation noise on the activations of real calls."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.gemm import Conv2d, Linear
from ..models.rowwise import fits
from .plan import can_be_int8


class Meter:
    """Sums, for each layer and timestep, the energy of its output and of the output's error in 8 bits.

    energies: timestep -> layer -> [signal, noise]. form: of 8 bits, as in Plan.
    """

    def __init__(self, unet: nn.Module, form: str = "int8") -> None:
        self.unet = unet
        self.layers = {name: module for name, module in unet.named_modules()
                       if isinstance(module, (Linear, Conv2d)) and module.int8 is None and can_be_int8(name)
                       and (form == "int8" or (isinstance(module, Linear) and fits(module.dense())))}
        self.energies: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
        self._twins = {name: _int8_twin(layer, form) for name, layer in self.layers.items()}
        self._timestep = float("nan")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While active, calls of the network from this thread are measured."""
        me = threading.get_ident()

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._timestep = float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).reshape(-1)[0])

        def after(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                if threading.get_ident() == me:
                    self._add(name, args, kwargs, output)
            return hook

        handles = [self.unet.register_forward_pre_hook(before, with_kwargs=True)]
        handles += [layer.register_forward_hook(after(name), with_kwargs=True) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        residual = args[1] if len(args) > 1 else None
        exact = output.float() if residual is None else output.float() - residual.float()
        noise = self._twins[name](args[0], **kwargs).float() - exact
        energy = self.energies[self._timestep][name]
        energy[0] += float(exact.square().sum(dtype=torch.float64))
        energy[1] += float(noise.square().sum(dtype=torch.float64))

    def sqnr(self, ends: Sequence[float]) -> dict[str, tuple[float, ...]]:
        """Layer -> dB in each range of timesteps, the ranges ending below ``ends``."""
        sums = {name: [[0.0, 0.0] for _ in ends] for name in self.layers}
        for timestep, layers in self.energies.items():
            at = next(i for i, end in enumerate(ends) if timestep < end)
            for name, (signal, noise) in layers.items():
                sums[name][at][0] += signal
                sums[name][at][1] += noise
        return {name: tuple(decibel(s, n) for s, n in row) for name, row in sums.items()}


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise (also where nothing was measured)."""
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def _int8_twin(layer: Linear | Conv2d, form: str) -> Linear | Conv2d:
    """A W8A8 layer of the same weight."""
    twin: Linear | Conv2d
    with torch.device("meta"):
        if isinstance(layer, Linear):
            twin = type(layer)(layer.in_features, layer.out_features, layer.bias is not None)
        else:
            twin = Conv2d(layer.in_channels, layer.out_channels, int(layer.kernel_size[0]), int(layer.stride[0]),
                          int(layer.padding[0]), layer.bias is not None)
    twin.weight = nn.Parameter(layer.dense(), requires_grad=False)
    if layer.bias is not None:
        twin.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    if form != "int8" and isinstance(twin, Linear):
        twin.quantize_rows(form)
    else:
        twin.quantize()
    return twin


def thirds(timesteps: Sequence[float]) -> list[float]:
    """Ends of three ranges with about equally many of the timesteps each, the last without an end."""
    times = sorted(set(timesteps))
    cuts = [times[len(times) * i // 3] for i in (1, 2)] if len(times) >= 3 else []
    return [*dict.fromkeys(cuts), float("inf")]

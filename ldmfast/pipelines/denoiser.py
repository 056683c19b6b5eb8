"""The network as the sampler sees it: guidance branches stacked, step-invariant work done once a call."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..caches import Policy
from ..errors import PrecisionError
from ..guidance import Branch, Plan
from ..models import UNet2DCondition
from .guided import Guided
from .lora import Cast

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Conditions:
    """Conditions of one guidance branch, one row a picture. Any of them may be absent.

    states: (N, tokens, width). pooled: (N, width) and time_ids: (N, 6), SDXL's added conditions.
    class_labels: (N,). timestep_cond: (N, dim), the guidance embedding of LCM-like networks. mask: (N, tokens) of
    ``states``. resolution: (N, 2) and aspect_ratio: (N, 1), PixArt's added conditions.
    tokens: (N,) int, the tokens of each row of states that count, where they are not all.
    """

    states: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    class_labels: torch.Tensor | None = None
    timestep_cond: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    resolution: torch.Tensor | None = None
    aspect_ratio: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    def rows(self, rows: list[int]) -> Conditions:
        return Conditions(*[None if v is None else v[rows] for v in vars(self).values()])


def _stack(branches: Sequence[Conditions]) -> dict[str, Any]:
    def join(name: str) -> torch.Tensor | None:
        values = [getattr(b, name) for b in branches]
        return None if values[0] is None else torch.cat(values)

    kwargs: dict[str, Any] = {}
    if branches[0].states is not None:
        kwargs["encoder_hidden_states"] = join("states")
    counts = join("tokens")
    if counts is not None:
        longest = int(counts.max())  # of those that share this forward: others must not decide what it computes
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :longest].contiguous()
        if int(counts.min()) < longest:
            kwargs["encoder_attention_mask"] = torch.arange(longest, device=counts.device) < counts[:, None]
    if branches[0].time_ids is not None:
        kwargs["added_cond_kwargs"] = {"text_embeds": join("pooled"), "time_ids": join("time_ids")}
    if branches[0].resolution is not None:
        kwargs["added_cond_kwargs"] = {"resolution": join("resolution"), "aspect_ratio": join("aspect_ratio")}
    if branches[0].mask is not None:
        kwargs["encoder_attention_mask"] = join("mask")
    if branches[0].class_labels is not None:
        kwargs["class_labels"] = join("class_labels")
    if branches[0].timestep_cond is not None:
        kwargs["timestep_cond"] = join("timestep_cond")
    return kwargs


class Denoiser(Guided):
    """Callable (x, t, stage) -> prediction, or one for each of the table's predictions.

    one_by_one runs every picture in a forward of its own (its guidance branches together), so that no picture's
    bits depend on what shares the batch, whatever the GEMM library does with other batch sizes. casts: networks (with
    their adapters) and the pictures that each draws. conditions: of what the plan's branches name.
    extra: (N, c, h, w) channels appended to the network input (9-channel inpainting). cache: policies; ``sessions``
    are their states, one for each group of pictures that share forwards.
    """

    def __init__(
        self,
        casts: Sequence[Cast],
        conditions: Mapping[str, Conditions],
        times: Sequence[float],
        plan: Plan,
        *,
        one_by_one: bool,
        extra: torch.Tensor | None = None,
        cache: Sequence[Policy] = (),
    ) -> None:
        self.unet, self.casts, self.extra = casts[0].unet, len(casts), extra
        self.dtype = next(self.unet.parameters()).dtype
        config = self.unet.config  # networks that learn the variance, too, give it behind their prediction
        self.channels = config.in_channels if config.out_channels == 2 * config.in_channels else None
        device = next(self.unet.parameters()).device
        groups = [(c.unet, rows) for c in casts for rows in ([[i] for i in c.pictures] if one_by_one else [c.pictures])]
        order = [i for _, rows in groups for i in rows]
        self.back = None if order == sorted(order) else torch.tensor(order).argsort().to(device)

        beside: dict[nn.Module, Any] = {}  # of each network, the state that was prepared last

        def prepare(unet: Any, names: Sequence[str], group: int, times: list[float]) -> Any:
            own = _stack([conditions[name].rows(groups[group][1]) for name in names])
            if not isinstance(unet, UNet2DCondition):
                return unet.prepare(times, **own)
            state = unet.prepare(times, **own, beside=beside.get(unet))
            beside[unet] = state
            return state

        super().__init__(plan, [unet for unet, _ in groups], [_index(rows, device) for _, rows in groups], times,
                         prepare, cache)

    def row(self, t: float, stage: int) -> int:
        """The number of a timestep in the states of its forward, where there is one."""
        return int(self.forwards[stage][0].states[0].numbers[float(t)])

    def __call__(self, x: torch.Tensor, t: float, stage: int) -> Any:
        return self.evaluate(x, self.shown(x, self.extra), t, stage)

    def predict(self, x: torch.Tensor, extra: torch.Tensor | None, branches: Sequence[Branch],
                networks: Sequence[Network]) -> Any:
        """Of a steady plan, and its forward of these branches. networks: the UNet of each group of pictures, its
        time and conditions filled in."""
        outs = self.batch(self.shown(x, extra), len(branches), networks)
        return self.plan.outputs(dict(zip(branches, outs)), 0, x, {})

    def shown(self, x: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        return (x if extra is None else torch.cat([x, extra.to(x.dtype)], dim=1)).to(self.dtype)

    def trimmed(self, y: torch.Tensor) -> torch.Tensor:
        return y[:, :self.channels]

    def ordered(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.back is None else y[self.back]


def _index(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """What picks these rows of a tensor without a copy from the host."""
    first, last = rows[0], rows[-1] + 1
    return slice(first, last) if rows == list(range(first, last)) else torch.tensor(rows, device=device)


def guidance_embedding(scale: float, pictures: int, dim: int) -> torch.Tensor:
    """(pictures, dim) fp32 sinusoidal embedding of ``scale - 1`` times 1000, the input of guidance-distilled
    networks (Luo et al., "Latent Consistency Models", section 4.3; sin half first, as their release)."""
    half = dim // 2
    decay = torch.log(torch.tensor(10000.0, dtype=torch.float32)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -decay)
    angles = (scale - 1) * 1000.0 * frequencies
    row = torch.cat([angles.sin(), angles.cos(), torch.zeros(dim % 2, dtype=angles.dtype)])
    return row.expand(pictures, dim)


class NanFinder:
    """While active, names the first module of ``models`` whose output holds NaN or infinity, as "unet.conv_in".

    The hook is torch's global one, filtered by thread, because the module itself is shared between threads.
    """

    def __init__(self, models: Iterable[tuple[str, torch.nn.Module]]) -> None:
        self.names = {id(m): f"{part}.{name}" for part, model in models
                      for name, m in model.named_modules() if name}
        self.thread = threading.get_ident()
        self.found: str | None = None

    def _hook(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self.found is None and threading.get_ident() == self.thread and id(module) in self.names:
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            if any(isinstance(t, torch.Tensor) and not bool(torch.isfinite(t).all()) for t in tensors):
                self.found = self.names[id(module)]

    def __enter__(self) -> NanFinder:
        self.handle = torch.nn.modules.module.register_module_forward_hook(self._hook)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.handle.remove()


def finite(x: torch.Tensor) -> bool:
    """Whether every number is. NaN and infinities survive a sum, which is one pass without a tensor of truth values;
    only where the sum itself leaves fp32 is each number looked at."""
    return math.isfinite(x.sum(dtype=torch.float32).item()) or bool(torch.isfinite(x).all())


def not_finite(where: str, module: str | None, precision: str) -> PrecisionError:
    inside = f", first in module {module!r}" if module else ""
    way_out = "use precision='exact'" if precision != "exact" else "check the weights and the inputs for NaN"
    return PrecisionError(f"the latents became NaN or infinite {where}{inside}; {way_out}")

"""The network as the sampler sees it: guidance branches stacked, step-invariant work done once a call."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..caches import Policy, Session
from ..errors import PrecisionError
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


class Denoiser:
    """Callable (x, t, stage) -> prediction, or (uncond, cond) when there are two branches.

    one_by_one runs every picture in a forward of its own (its guidance branches together), so that no picture's
    bits depend on what shares the batch, whatever the GEMM library does with other batch sizes. casts: networks (with
    their adapters) and the pictures that each draws.
    extra: (N, c, h, w) channels appended to the network input (9-channel inpainting). cache: policies; ``sessions``
    are their states, one for each group of pictures that share forwards.
    """

    def __init__(
        self,
        casts: Sequence[Cast],
        branches: Sequence[Conditions],
        times: Sequence[float],
        *,
        one_by_one: bool,
        extra: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        cache: Sequence[Policy] = (),
    ) -> None:
        self.dtype = next(casts[0].unet.parameters()).dtype
        self.branches = len(branches)
        config = casts[0].unet.config  # networks that learn the variance, too, give it behind their prediction
        self.channels = config.in_channels if config.out_channels == 2 * config.in_channels else None
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self.extra = extra
        self.unet = casts[0].unet
        self.casts = len(casts)
        device = next(self.unet.parameters()).device
        groups = [(c.unet, rows) for c in casts for rows in ([[i] for i in c.pictures] if one_by_one else [c.pictures])]
        order = [i for _, rows in groups for i in rows]
        self.back = None if order == sorted(order) else torch.tensor(order).argsort().to(device)
        self.unets = [unet for unet, _ in groups]
        self.groups = [_index(rows, device) for _, rows in groups]
        distinct = list(dict.fromkeys(float(t) for t in times))
        self.states = [unet.prepare(distinct, **_stack([b.rows(rows) for b in branches])) for unet, rows in groups]
        self.sessions = [Session.of(cache, unet, times) for unet in self.unets]
        # of the conditional branch alone, where a cache ends guidance
        self.alone = [None if s is None or not 0 < s.single_from < len(times) or len(branches) == 1 else
                      unet.prepare(distinct, **_stack([branches[-1].rows(rows)]))
                      for s, (unet, rows) in zip(self.sessions, groups)]

    def row(self, t: float) -> int:
        """The number of a timestep in the states."""
        return int(self.states[0].numbers[float(t)])

    def __call__(self, x: torch.Tensor, t: float, stage: int) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.predict(x, self.extra, [partial(self._network, i, t, stage) for i in range(len(self.unets))])

    def _network(self, group: int, t: float, stage: int, rows: torch.Tensor) -> torch.Tensor:
        unet, state, session = self.unets[group], self.states[group], self.sessions[group]
        if session is None:
            return unet(rows, timestep=t, state=state)
        if self.alone[group] is not None and session.single(stage):
            state = self.alone[group]
        return session.evaluate(partial(unet, timestep=t, state=state, cache=session), rows, stage, self.branches)

    def predict(self, x: torch.Tensor, extra: torch.Tensor | None, networks: Sequence[Network]
                ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """networks: the UNet of each group of pictures, its time and conditions filled in."""
        if extra is not None:
            x = torch.cat([x, extra.to(x.dtype)], dim=1)
        x = x.to(self.dtype)
        parts: list[tuple[torch.Tensor, ...]] = []
        for group, network in zip(self.groups, networks):
            rows = torch.cat([x[group]] * self.branches)
            parts.append(network(rows)[:, :self.channels].chunk(self.branches))  # without a learned variance
        outs = tuple(p[0] if len(parts) == 1 else torch.cat(p) for p in zip(*parts))
        if self.back is not None:
            outs = tuple(out[self.back] for out in outs)
        if len(outs) == 1:
            return outs[0]
        if self.guidance_rescale > 0:
            return rescaled_guidance(outs[0], outs[1], self.guidance_scale, self.guidance_rescale)
        return outs


def _index(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """What picks these rows of a tensor without a copy from the host."""
    first, last = rows[0], rows[-1] + 1
    return slice(first, last) if rows == list(range(first, last)) else torch.tensor(rows, device=device)


def rescaled_guidance(uncond: torch.Tensor, cond: torch.Tensor, scale: float, rescale: float) -> torch.Tensor:
    """Classifier-free guidance whose standard deviation a picture is pulled to the conditional prediction's
    (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", eq. 15-16). Not linear in the
    predictions, so it cannot be folded into a step table."""
    uncond, cond = uncond.float(), cond.float()
    guided = uncond + scale * (cond - uncond)
    dims = list(range(1, cond.ndim))
    matched = guided * (cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return rescale * matched + (1 - rescale) * guided


def guidance_embedding(scale: float, pictures: int, dim: int) -> torch.Tensor:
    """(pictures, dim) fp32 sinusoidal embedding of ``scale - 1`` times 1000, the input of guidance-distilled
    networks (Luo et al., "Latent Consistency Models", section 4.3; sin half first, as their release)."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (scale - 1) * 1000.0 * frequencies
    row = torch.cat([angles.sin(), angles.cos(), torch.zeros(dim % 2)])
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

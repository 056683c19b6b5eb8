"""What the tiny model's scripts share: configs, precision, checkpoints, logs."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

VAE_CONFIG: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(16, 32, 64, 64),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    sample_size=64,
)

UNET_CONFIG: dict[str, Any] = dict(
    sample_size=8,
    in_channels=8,
    out_channels=8,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(96, 96),
    layers_per_block=1,
    cross_attention_dim=128,
    attention_head_dim=3,  # the number of heads, as in SD 1.x
    norm_num_groups=8,
)
TEXT_CONFIG: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=32,
    projection_dim=128,
    hidden_act="quick_gelu",
)
# Ends at sqrt(alpha_bar) = 0.015, against 0.068 of SD's beta_end 0.012: with plain backgrounds on 8x8
# latents the mean colour would otherwise still be readable from the last, supposedly pure noise.
SCHEDULE: dict[str, Any] = dict(
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.02,
    prediction_type="v_prediction",
)
SAMPLING: dict[str, Any] = dict(
    clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", steps_offset=1
)


def autocast() -> torch.autocast:
    """bf16 matrix products and convolutions, fp32 master weights."""
    return torch.autocast("cpu", torch.bfloat16)


def cosine(step: int, fraction: float, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up over `warmup` steps times a cosine from `peak` to `floor * peak` at fraction 1."""
    fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return peak * fall * min(1.0, (step + 1) / warmup)


def start_workers() -> tuple[int, int]:
    """(rank, world size) under torchrun, (0, 1) without. One single-threaded worker a core waits for the
    others once an iteration instead of at every operator, which matters on a machine that is shared."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients over the workers, in place, in one message."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))


class Progress:
    """The share of a run that is done: by iterations, or by the clock when a deadline (unix time) is given.

    All workers use the first worker's clock, so that they agree on the learning rate and on the end.
    """

    def __init__(self, total: int, deadline: float = 0.0, spent: float = 0.0) -> None:
        self.total, self.deadline, self.spent, self.start = total, deadline, spent, time.time()

    @property
    def seconds(self) -> float:
        return self.spent + time.time() - self.start

    def fraction(self, step: int) -> float:
        if not self.deadline:
            return step / self.total
        used = self.seconds
        share = torch.tensor(used / max(used, used + self.deadline - time.time()))
        if dist.is_initialized():
            dist.broadcast(share, 0)
        return float(share)


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over pictures of the PSNR in dB; pictures in [-1, 1] (peak to peak 2)."""
    mse = (x.float() - y.float()).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / mse)).mean())


def save_atomic(obj: Any, path: Path) -> None:
    """torch.save to a temporary name, then rename: a killed run leaves the previous checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(obj, temporary)
    os.replace(temporary, path)


class Ema:
    """Exponential moving average of a module's parameters, with the usual warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.shadow.values()), [p.detach() for p in module.parameters()], 1 - decay
        )


class Log:
    """Rows appended to a CSV file, echoed to stdout."""

    def __init__(self, path: Path, fields: tuple[str, ...]) -> None:
        self.path, self.fields, self.start = path, fields, time.time()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with path.open("w", newline="") as file:
                csv.writer(file).writerow(fields)

    def row(self, **values: Any) -> None:
        cells = [values.get(f, "") for f in self.fields]
        cells = [f"{c:.5g}" if isinstance(c, float) else c for c in cells]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(cells)
        print(" ".join(f"{f}={c}" for f, c in zip(self.fields, cells) if c != ""), flush=True)


class LatentStats:
    """Running mean and std per latent channel, (8,) each, of the encoder's samples."""

    def __init__(self, latents: Tensor) -> None:
        self.mean = latents.mean((0, 2, 3))
        self.std = latents.std((0, 2, 3))


@torch.no_grad()
def whiten_latents(vae: nn.Module, stats: LatentStats) -> None:
    """Folds (z - mean) / std into the VAE's 1x1 convolutions, in place: latents get mean 0 and std 1.

    The pipeline of diffusers knows one scalar scaling factor only; here every channel gets its own scale
    and shift at no cost. The decoder's function of the picture is unchanged.
    """
    mean, std = stats.mean, stats.std
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the log variance of the scaled latent
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std.view(1, -1, 1, 1)

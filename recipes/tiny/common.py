"""What the tiny model's scripts share: configs, precision, checkpoints, logs."""

from __future__ import annotations

import csv
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
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


def autocast() -> torch.autocast:
    """bf16 matrix products and convolutions, fp32 master weights."""
    return torch.autocast("cpu", torch.bfloat16)


def cosine(step: int, total: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up, then cosine from `peak` to `floor * peak` at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    u = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * u)))


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

"""Trains the tiny model's KL autoencoder: 64x64 pictures <-> 8x8 latents of 8 channels.

    torchrun --nproc-per-node 2 recipes/tiny/train_vae.py --folder runs/tiny --steps 4000

One single-threaded worker a core; plain `python` works too. `--deadline` (unix time) plans the cosine by the
clock instead of by iterations. Restartable: call it again with the same arguments after an interruption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import (
    VAE_CONFIG,
    Log,
    Progress,
    autocast,
    average_gradients,
    cosine,
    psnr,
    save_atomic,
    start_workers,
)
from diffusers import AutoencoderKL
from fast_norm import use_fast_norm
from torch import Tensor

from ldmfast.testing.scenes import render, sample_scenes


def picture_pool(count: int, seed: int) -> Tensor:
    """(count, 3, 64, 64) uint8 pictures of training scenes."""
    parts = []
    for start in range(0, count, 2048):
        scenes = sample_scenes(min(2048, count - start), seed + start)
        parts.append(((render(scenes) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def batch_of(pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random pictures, half of them mirrored (every shape is symmetric), (size, 3, 64, 64) in [-1, 1]."""
    rows = torch.randint(len(pool), (size,), generator=generator)
    x = pool[rows].float() / 127.5 - 1
    flip = torch.rand(size, generator=generator) < 0.5
    x[flip] = x[flip].flip(3)
    return x.contiguous(memory_format=torch.channels_last)


def evaluate(model: AutoencoderKL, pictures: Tensor) -> float:
    model.eval()
    with torch.no_grad(), autocast():
        parts = [model.decode(model.encode(x).latent_dist.mode()).sample.float() for x in pictures.split(64)]
    model.train()
    return psnr(torch.cat(parts).clamp(-1, 1), pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--deadline", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=16, help="pictures an iteration, all workers together")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=5e-4)
    parser.add_argument("--pool", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rank, world = start_workers()
    torch.set_num_threads(max(1, 2 // world))
    torch.manual_seed(args.seed)
    model = use_fast_norm(AutoencoderKL(**VAE_CONFIG)).to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(args.seed + rank)
    checkpoint, step, spent = args.folder / "vae.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        generator.manual_seed(args.seed + rank + 1000 * step)  # a restart draws on, it does not repeat
    torch.manual_seed(args.seed + rank + 1000 * step)
    pool = picture_pool(args.pool // world, seed=1_000_000 * (1 + args.seed) + args.pool * rank)
    held_out = render(sample_scenes(128, seed=7, split="heldout")).contiguous(memory_format=torch.channels_last)
    log = Log(args.folder / "vae.csv", ("step", "loss", "l1", "kl", "psnr", "seconds"))
    progress = Progress(args.steps, args.deadline, spent)
    while (fraction := progress.fraction(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, fraction, args.lr, 100)
        x = batch_of(pool, args.batch // world, generator)
        with autocast():
            posterior = model.encode(x).latent_dist
            y = model.decode(posterior.sample()).sample
        difference = y.float() - x
        l1 = difference.abs().mean()
        # nats per latent value against the unit Gaussian
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = l1 + 0.5 * difference.square().mean() + args.kl * kl
        loss.backward()
        average_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if rank == 0 and (step % 250 == 0 or step in (20, 60)):
            log.row(step=step, loss=loss.item(), l1=l1.item(), kl=kl.item(), psnr=evaluate(model, held_out),
                    seconds=progress.seconds)
        if rank == 0 and step % 500 == 0:
            save(checkpoint, model, optimizer, step, progress.seconds)
    if rank == 0:
        log.row(step=step, psnr=evaluate(model, held_out), seconds=progress.seconds)
        save(checkpoint, model, optimizer, step, progress.seconds)


def save(path: Path, model: AutoencoderKL, optimizer: torch.optim.Optimizer, step: int, spent: float) -> None:
    save_atomic({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}, path)


if __name__ == "__main__":
    main()

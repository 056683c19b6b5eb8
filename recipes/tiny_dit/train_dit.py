"""Trains the tiny diffusion transformer (rectified flow) on latents of captioned scenes.

    torchrun --nproc-per-node 2 recipes/tiny_dit/train_dit.py --folder runs/tiny_dit --steps 5000

Autoencoder and caption encoder are the shipped UNet's, frozen. One single-threaded worker a core; plain `python`
works too. `--deadline` (unix time) plans the cosine by the clock instead of by iterations. Restartable.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Ema, Log, Progress, autocast, average_gradients, cosine, save_atomic, start_workers
from network import CLASSES, NULL_TOKENS, Velocity, load_text_encoder, load_tokenizer, load_vae, null_bias
from tokenizer import MAX_TOKENS
from torch import Tensor, nn

from ldmfast.testing.scenes import Scene, render, sample_scenes

MUON = 4  # times the rate of AdamW
Text = tuple[Tensor, Tensor]  # token states (n, 32, 128) and the end-of-text state (n, 128)


class Encoder:
    """Draws fresh training scenes and encodes pictures and captions."""

    def __init__(self, pairs: float) -> None:
        self.vae = load_vae().to(memory_format=torch.channels_last)
        self.tokenizer, self.text, self.pairs = load_tokenizer(), load_text_encoder(), pairs

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Text:
        """As diffusers' SD 3 pipeline does: the states before the last layer, and the projected end of the text."""
        ids = self.tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        with autocast():
            out = self.text(ids, output_hidden_states=True)
        return out.hidden_states[-2].bfloat16(), out.text_embeds.bfloat16()

    @torch.no_grad()
    def fresh(self, count: int, seed: int) -> tuple[Tensor, ...]:
        """Posterior means and deviations (n, 8, 8, 8), states, pooled, and the class (-1: two kinds of object)."""
        scenes, parts = sample_scenes(count, seed, pairs=self.pairs), []
        for start in range(0, count, 128):
            some = scenes[start : start + 128]
            with autocast():
                posterior = self.vae.encode(render(some).contiguous(memory_format=torch.channels_last)).latent_dist
            text = self.encode([scene.caption for scene in some])
            means, deviations = (x.contiguous().bfloat16() for x in (posterior.mean, posterior.std))
            parts.append((means, deviations, *text, torch.tensor([class_of(scene) for scene in some])))
        return tuple(torch.cat(column) for column in zip(*parts))


def class_of(scene: Scene) -> int:
    return -1 if scene.is_pair else CLASSES.index(f"{scene.items[0].colour} {scene.items[0].shape}")


@dataclass
class Pool:
    """What Encoder.fresh gives, refreshed in parts."""

    columns: tuple[Tensor, ...]
    cursor: int = 0

    def refresh(self, fresh: tuple[Tensor, ...], limit: int) -> None:
        """Fresh scenes are added until there are `limit`, then they take the place of the oldest."""
        if len(self.columns[0]) < limit:
            self.columns = tuple(torch.cat(pair) for pair in zip(self.columns, fresh))
            return
        rows = (torch.arange(len(fresh[0])) + self.cursor) % len(self.columns[0])
        for column, new in zip(self.columns, fresh):
            column[rows] = new
        self.cursor = (self.cursor + len(rows)) % len(self.columns[0])


class Conditions:
    """What the network is told of a batch: its captions to both encoders; or to the second one the class alone
    (--classes of the scenes with one kind of object); or nothing (--drop of all)."""

    def __init__(self, encoder: Encoder, drop: float, classes: float) -> None:
        self.empty, self.named = encoder.encode([""]), encoder.encode(CLASSES)
        self.drop, self.classes = drop, classes

    def __call__(self, text: Text, labels: Tensor, generator: torch.Generator) -> Text:
        u = torch.rand(len(labels), generator=generator)
        nothing = u < self.drop
        by_class = ~nothing & (labels >= 0) & (u < self.drop + self.classes)
        joined = []
        for own, empty, named in zip(text, self.empty, self.named):
            shape = (-1,) + (1,) * (own.dim() - 1)
            first = torch.where((nothing | by_class).view(shape), empty, own)
            joined.append(torch.cat([first, torch.where(by_class.view(shape), named[labels], first)], -1))
        return joined[0], joined[1]


def drawn_sigmas(size: int, generator: torch.Generator, mean: float, spread: float) -> Tensor:
    """Logit-normal noise levels (Esser et al. 2024, section 3.1), one from each of `size` equal parts of the law; a
    tenth is uniform, so that both ends are seen."""
    u = ((torch.arange(size) + torch.rand(size, generator=generator)) / size).clamp(1e-4, 1 - 1e-4)
    sigma = torch.sigmoid(mean + spread * torch.special.ndtri(u))
    return torch.where(torch.rand(size, generator=generator) < 0.1, torch.rand(size, generator=generator), sigma)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--deadline", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=256, help="samples an iteration, all workers together")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--drop", type=float, default=0.1, help="share of empty captions")
    parser.add_argument("--classes", type=float, default=0.2, help="share of class names in place of captions")
    parser.add_argument("--mean", type=float, default=0.4, help="of the logit of sigma: above 0, more noise")
    parser.add_argument("--spread", type=float, default=1.2, help="standard deviation of the logit of sigma")
    parser.add_argument("--pool", type=int, default=65536)
    parser.add_argument("--initial", type=int, default=16384, help="scenes encoded before the first iteration")
    parser.add_argument("--refresh", type=int, default=512, help="fresh scenes every 16 iterations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=float, default=0.8, help="share of scenes with two different objects")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints")
    return parser.parse_args()


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if "transformer_blocks" in name and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]


def main() -> None:
    args = parse()
    rank, world = start_workers()
    torch.set_num_threads(max(1, 2 // world))
    torch.manual_seed(args.seed)
    model = Velocity()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    encoder = Encoder(args.pairs)
    conditions = Conditions(encoder, args.drop, args.classes)
    velocity = torch.compile(model, dynamic=False) if args.compile else model
    optimizer = optimizers(model)
    ema = Ema(model, args.ema)
    biases = [null_bias(count) for count in NULL_TOKENS]
    checkpoint, step, spent = args.folder / "dit.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for one, kept in zip(optimizer, state["optimizers"]):
            one.load_state_dict(kept)
        ema.shadow, ema.updates = state["ema"], state["ema_updates"]
        step, spent = state["step"], state["spent"]
    # A restart draws on where the seeds of the first start would never come: it does not repeat.
    generator = torch.Generator().manual_seed(args.seed + rank + 1000 * step)
    seed = 300_000_000 * (1 + args.seed) + 50_000_000 * rank + 10 * step
    pool = Pool(encoder.fresh(args.initial // world, seed))
    log = Log(args.folder / "dit.csv", ("step", "samples", "loss", "low", "mid", "high", "lr", "seconds"))
    progress = Progress(args.steps, args.deadline, spent)
    saved, history, levels = time.time(), [], []
    while (fraction := progress.fraction(step)) < 1:
        rate = cosine(step, fraction, args.lr, args.warmup)
        for one in optimizer:
            for group in one.param_groups:
                group["lr"] = rate * (MUON if isinstance(one, torch.optim.Muon) else 1)
        if step % 16 == 0:
            seed += 1
            pool.refresh(encoder.fresh(args.refresh // world, seed), args.pool // world)
        rows = torch.randint(len(pool.columns[0]), (args.batch // world,), generator=generator)
        mean, deviation, states, pooled, labels = (column[rows] for column in pool.columns)
        z = mean.float().addcmul(deviation.float(), torch.randn(mean.shape, generator=generator))
        states, pooled = conditions((states, pooled), labels, generator)
        sigma = drawn_sigmas(len(z), generator, args.mean, args.spread)
        noise = torch.randn(z.shape, generator=generator)
        with autocast():
            v = velocity(torch.lerp(z, noise, sigma.view(-1, 1, 1, 1)), sigma, states, pooled, biases[step % 2])
        losses = F.mse_loss(v.float(), noise - z, reduction="none").flatten(1).mean(1)
        losses.mean().backward()
        average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for one in optimizer:
            one.step()
            one.zero_grad(set_to_none=True)
        if rank == 0:
            ema.update(model)
        history.append(losses.detach())
        levels.append(sigma)
        step += 1
        if rank == 0 and (step % 50 == 0 or step in (10, 20)):
            log.row(step=step, samples=step * args.batch, lr=rate, seconds=progress.seconds,
                    **by_level(torch.cat(history), torch.cat(levels)))
            history.clear()
            levels.clear()
        if rank == 0 and time.time() - saved > args.save_every:
            saved = time.time()
            save(checkpoint, model, optimizer, ema, step, progress.seconds)
    if rank == 0:
        save(checkpoint, model, optimizer, ema, step, progress.seconds)


def by_level(losses: Tensor, sigma: Tensor) -> dict[str, float]:
    """Mean loss, and those of thirds of the noise levels."""
    edges = ((0, 1 / 3, "low"), (1 / 3, 2 / 3, "mid"), (2 / 3, 1.01, "high"))
    return {"loss": float(losses.mean()),
            **{name: float(losses[(sigma >= a) & (sigma < b)].mean()) for a, b, name in edges}}


def save(path: Path, model: nn.Module, optimizer: Any, ema: Ema, step: int, spent: float) -> None:
    save_atomic({"model": model.state_dict(), "optimizers": [one.state_dict() for one in optimizer],
                 "ema": ema.shadow, "ema_updates": ema.updates, "step": step, "spent": spent}, path)


if __name__ == "__main__":
    main()

"""Trains the tiny model's text encoder and UNet jointly on latents of captioned scenes.

    torchrun --nproc-per-node 2 recipes/tiny/train_unet.py --folder runs/tiny --steps 7000

Needs the finished `vae.pt` of train_vae.py in the same folder. One single-threaded worker a core; plain
`python` works too. `--deadline` (unix time) plans the cosine by the clock instead of by iterations.
Restartable: call it again with the same arguments after an interruption.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    SCHEDULE,
    TEXT_CONFIG,
    UNET_CONFIG,
    VAE_CONFIG,
    Ema,
    LatentStats,
    Log,
    Progress,
    autocast,
    average_gradients,
    cosine,
    save_atomic,
    start_workers,
    whiten_latents,
)
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from fast_norm import use_fast_norm
from tokenizer import MAX_TOKENS, build_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldmfast.testing.scenes import render, sample_scenes


class TextToLatent(nn.Module):
    """The two networks that are trained together: token ids and a noisy latent in, v out."""

    def __init__(self, vocabulary: int, bos: int, eos: int) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=vocabulary, bos_token_id=bos, eos_token_id=eos, pad_token_id=eos, **TEXT_CONFIG
        )
        # Plain products and softmax: the backward of torch's fused CPU attention takes half of an iteration
        # at these sizes.
        config._attn_implementation = "eager"
        self.text = CLIPTextModel(config)
        self.unet = UNet2DConditionModel(**UNET_CONFIG).to(memory_format=torch.channels_last)
        self.unet.set_attn_processor(AttnProcessor())

    def forward(self, z: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(z, t, self.text(ids).last_hidden_state).sample


@dataclass
class Pool:
    """Posterior means and standard deviations (n, 8, 8, 8) and token ids (n, 32) of scenes, refreshed in parts."""

    mean: Tensor
    std: Tensor
    ids: Tensor
    cursor: int = 0

    def refreshed(self, fresh: tuple[Tensor, Tensor, Tensor], limit: int) -> Pool:
        """The pool with fresh scenes: added until there are `limit`, then in the place of the oldest."""
        if len(self.ids) < limit:
            return Pool(*(torch.cat(pair) for pair in zip((self.mean, self.std, self.ids), fresh)))
        rows = (torch.arange(len(fresh[2])) + self.cursor) % len(self.ids)
        self.mean[rows], self.std[rows], self.ids[rows] = fresh
        self.cursor = (self.cursor + len(rows)) % len(self.ids)
        return self

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.ids), (size,), generator=generator)
        z = self.mean[rows].float()
        return z.addcmul(self.std[rows].float(), torch.randn(z.shape, generator=generator)), self.ids[rows]


class Encoder:
    """Draws fresh training scenes and encodes them."""

    def __init__(self, vae: AutoencoderKL, tokenizer, pairs: float) -> None:
        self.vae, self.tokenizer, self.pairs = vae, tokenizer, pairs

    def tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(
            captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def fresh(self, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        scenes = sample_scenes(count, seed, pairs=self.pairs)
        means, stds = [], []
        for start in range(0, count, 128):
            x = render(scenes[start : start + 128]).contiguous(memory_format=torch.channels_last)
            with autocast():
                posterior = self.vae.encode(x).latent_dist
            means.append(posterior.mean.contiguous().bfloat16())
            stds.append(posterior.std.contiguous().bfloat16())
        return torch.cat(means), torch.cat(stds), self.tokens([scene.caption for scene in scenes])


def load_vae(run: Path) -> AutoencoderKL:
    """The trained VAE, whitened (see common.whiten_latents) on 2048 fresh training scenes."""
    target = run / "vae_white.pt"
    vae = AutoencoderKL(**VAE_CONFIG)
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()  # the first worker writes the file
    if target.exists():
        vae.load_state_dict(torch.load(target, weights_only=True))
    else:
        vae.load_state_dict(torch.load(run / "vae.pt", weights_only=True)["model"])
        with torch.no_grad():
            pictures = render(sample_scenes(2048, seed=3))
            parts = [vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0)) for x in pictures.split(128)]
        stats = LatentStats(torch.cat(parts))
        print("latent mean", stats.mean.tolist(), "std", stats.std.tolist(), flush=True)
        whiten_latents(vae, stats)
        save_atomic(vae.state_dict(), target)
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def stratified_times(size: int, generator: torch.Generator, power: float) -> Tensor:
    """Timesteps 1000 u^power, one u from each of `size` equal parts of [0, 1): less variance than independent.

    A power below 1 favours the noisy end, where the layout is decided.
    """
    u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    return (u**power * SCHEDULE["num_train_timesteps"]).long()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--deadline", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=256, help="samples an iteration, all workers together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--drop", type=float, default=0.1, help="share of empty captions")
    parser.add_argument("--pool", type=int, default=65536)
    parser.add_argument("--initial", type=int, default=16384, help="scenes encoded before the first iteration")
    parser.add_argument("--refresh", type=int, default=512, help="fresh scenes every 16 iterations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=float, default=0.8, help="share of scenes with two different objects")
    parser.add_argument("--power", type=float, default=0.7, help="below 1: more of the noisy timesteps")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints")
    return parser.parse_args()


def loss_of(
    model: nn.Module, z: Tensor, ids: Tensor, alphas: Tensor, generator: torch.Generator, power: float
) -> Tensor:
    """Mean squared error of v = a eps - s z0 (Salimans and Ho 2022, appendix D), per picture, fp32."""
    t = stratified_times(len(z), generator, power)
    a, s = (x[t].view(-1, 1, 1, 1) for x in (alphas.sqrt(), (1 - alphas).sqrt()))
    noise = torch.randn(z.shape, generator=generator)
    noisy = (a * z + s * noise).contiguous(memory_format=torch.channels_last)
    with autocast():
        v = model(noisy, t, ids)
    return F.mse_loss(v.float(), a * noise - s * z, reduction="none").flatten(1).mean(1)


def main() -> None:
    args = parse()
    rank, world = start_workers()
    torch.set_num_threads(max(1, 2 // world))
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.folder / f"tokenizer{rank}")
    model = TextToLatent(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    print({name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}, flush=True)
    encoder = Encoder(load_vae(args.folder), tokenizer, args.pairs)
    # Compiled: 1.55 times the speed of eager here, after minutes of compilation (cached for restarts).
    network = torch.compile(model, dynamic=False) if args.compile else use_fast_norm(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = Ema(model, args.ema)
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
    checkpoint, step, spent = args.folder / "unet.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow, ema.updates = state["ema"], state["ema_updates"]
        step, spent = state["step"], state["spent"]
    # A restart draws on where the seeds of the first start would never come: it does not repeat.
    generator = torch.Generator().manual_seed(args.seed + rank + 1000 * step)
    seed = 100_000_000 * (1 + args.seed) + 50_000_000 * rank + 10 * step
    pool = Pool(*encoder.fresh(args.initial // world, seed))
    empty = encoder.tokens([""])
    log = Log(args.folder / "unet.csv", ("step", "samples", "loss", "low", "mid", "high", "lr", "seconds"))
    progress = Progress(args.steps, args.deadline, spent)
    saved = time.time()
    history: list[Tensor] = []
    while (fraction := progress.fraction(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate = cosine(step, fraction, args.lr, args.warmup)
        if step % 16 == 0:
            seed += 1
            pool = pool.refreshed(encoder.fresh(args.refresh // world, seed), args.pool // world)
        z, ids = pool.batch(args.batch // world, generator)
        ids = torch.where(torch.rand(len(ids), 1, generator=generator) < args.drop, empty, ids)
        losses = loss_of(network, z, ids, alphas, generator, args.power)
        losses.mean().backward()
        average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            ema.update(model)
        history.append(losses.detach())
        step += 1
        if rank == 0 and (step % 100 == 0 or step in (10, 30)):
            thirds = [float(part.mean()) for part in torch.stack(history).mean(0).tensor_split(3)]
            log.row(step=step, samples=step * args.batch, loss=float(torch.stack(history).mean()), low=thirds[0],
                    mid=thirds[1], high=thirds[2], lr=rate, seconds=progress.seconds)
            history.clear()
        if rank == 0 and time.time() - saved > args.save_every:
            saved = time.time()
            save(checkpoint, model, optimizer, ema, step, progress.seconds)
    if rank == 0:
        save(checkpoint, model, optimizer, ema, step, progress.seconds)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, step: int, spent: float) -> None:
    save_atomic({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.shadow,
                 "ema_updates": ema.updates, "step": step, "spent": spent}, path)


if __name__ == "__main__":
    main()

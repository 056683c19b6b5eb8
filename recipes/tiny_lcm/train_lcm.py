"""Distils the shipped UNet with guidance 3 into low-rank changes for 4 steps of one forward each.

    python recipes/tiny_lcm/train_lcm.py --folder runs/tiny_lcm --steps 6000 --compile

The teacher solves the guided ODE (DPM-Solver++ 2M, 12 steps, ldmfast in bf16) for fresh training captions, from noise
or from a state that the student's own first steps reach; the student learns to jump from each of its four times to the
path's end (a latent consistency model: Luo et al. 2023). Restartable: call it again with the same arguments.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Ema, Log, Progress, autocast, cosine, save_atomic
from student import TIMES, Angles, Student
from torch import Tensor, nn

from ldmfast import Pipeline
from ldmfast.pipelines.text import encode_prompts
from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import judge
from ldmfast.testing.scenes import sample_scenes

PARTS = 3  # steps of the teacher in each quarter
GRID = [round(a + (b - a) * k / PARTS) for a, b in zip(TIMES, (*TIMES[1:], 0)) for k in range(PARTS)]


class Teacher:
    """The guided teacher's paths, and the captions they belong to."""

    def __init__(self, guidance: float, pairs: float) -> None:
        self.pipe, self.guidance, self.pairs = Pipeline.tiny(precision="bf16"), guidance, pairs

    def texts(self, count: int, seed: int) -> tuple[list[str], Tensor]:
        captions = [scene.caption for scene in sample_scenes(count, seed, pairs=self.pairs)]
        return captions, encode(self.pipe, captions)

    def path(self, captions: list[str], x: Tensor, first: int) -> Tensor:
        """(n, 5, 8, 8, 8) bf16 latents at TIMES and at the end, from x at TIMES[first]; zeros before it."""
        points = [torch.zeros_like(x)] * first + [x]

        def keep(call: Any, step: int, timestep: float, tensors: dict[str, Tensor]) -> None:
            if (step + 1) % PARTS == 0:
                points.append(tensors["latents"].float().clone())

        self.pipe(captions, timesteps=GRID[first * PARTS:], solver="dpmpp_2m", guidance_scale=self.guidance,
                  latents=x, output_type="latent", callback_on_step_end=keep, progress=False)
        return torch.stack(points, 1).bfloat16()


@dataclass
class Pool:
    """Paths (n, 5, 8, 8, 8), states of their captions (n, 32, 128), and at which of TIMES each began, (n,)."""

    points: Tensor
    text: Tensor
    first: Tensor

    def add(self, limit: int, *fresh: Tensor) -> None:
        old = (self.points, self.text, self.first)
        self.points, self.text, self.first = (torch.cat(pair)[-limit:] for pair in zip(old, fresh))

    def rows(self, quarter: Tensor, generator: torch.Generator) -> Tensor:
        """A path for each quarter. Half of them began there, if any did: at a state of the student's own."""
        rows = torch.empty_like(quarter)
        for q in quarter.unique():
            places = (quarter == q).nonzero().flatten()
            half = len(places) // 2
            own, known = (self.first == q).nonzero().flatten(), (self.first <= q).nonzero().flatten()
            for some, source in ((places[:half], own if len(own) else known), (places[half:], known)):
                rows[some] = source[torch.randint(len(source), (len(some),), generator=generator)]
        return rows


@torch.no_grad()
def encode(pipe: Pipeline, captions: list[str]) -> Tensor:
    """(n, 32, 128) bf16 states of the captions."""
    return encode_prompts(pipe.loaded.text_encoders, captions).states.bfloat16()


def targets(points: Tensor, rows: Tensor, quarter: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and the v by which the jump to the path's end is exact."""
    times = torch.tensor(TIMES)[quarter]
    x, clean = points[rows, quarter].float(), points[rows, -1].float()
    cos, sin = angles.turn(times, torch.full_like(times, -1))
    return x, times, (cos * x - clean) / sin


@torch.no_grad()
def generate(student: Student, text: Tensor, noise: Tensor, angles: Angles, steps: int = 4) -> Tensor:
    """Latents after the first steps: to the clean end, and, but for the last of the four, back to the next time with
    fresh noise. LCM's boundary terms are left out: at these times c_skip is below 1e-7."""
    x, generator = noise, torch.Generator().manual_seed(int(noise[0, 0, 0, 0] * 1e6))
    for i, time_ in enumerate(TIMES[:steps]):
        t = torch.full((len(x),), time_)
        with autocast():
            v = student.unet(x.contiguous(memory_format=torch.channels_last), t, text).sample.float()
        cos, sin = angles.turn(t, torch.full_like(t, -1))
        x = cos * x - sin * v
        if i < len(TIMES) - 1:
            phi = angles.phi[TIMES[i + 1]]
            x = phi.cos() * x + phi.sin() * torch.randn(x.shape, generator=generator)
    return x


class Judge:
    """Mean attribute accuracy of 4-step pictures of held-out captions (not those that the report uses)."""

    def __init__(self, pipe: Pipeline, count: int) -> None:
        scenes = sample_scenes(count, seed=1, split="heldout")
        self.pipe, self.wanted = pipe, [expected_of(scene) for scene in scenes]
        self.text = encode(pipe, [scene.caption for scene in scenes])
        self.noise = torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(1))

    def __call__(self, latents: Tensor) -> float:
        with torch.inference_mode():
            images = torch.cat([self.pipe.vae.decode(z.to(self.pipe.vae.dtype)).float() for z in latents.split(64)])
        shares: dict[str, list[bool]] = {}
        for verdict in judge(images, self.wanted):
            for name, right in verdict.items():
                shares.setdefault(name, []).append(right)
        return 100 * sum(sum(v) / len(v) for v in shares.values()) / len(shares)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--deadline", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--linear-rank", type=int, default=20)
    parser.add_argument("--conv-rank", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--initial", type=int, default=512, help="paths before the first iteration")
    parser.add_argument("--every", type=int, default=8, help="iterations after which 64 paths are added")
    parser.add_argument("--pool", type=int, default=16384, help="paths kept, the newest")
    parser.add_argument("--pairs", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save-every", type=float, default=90, help="seconds between checkpoints")
    parser.add_argument("--judge-every", type=float, default=180, help="seconds between judgements")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    angles, teacher = Angles(), Teacher(args.guidance, args.pairs)
    student = Student(args.linear_rank, args.conv_rank)
    print(f"{sum(p.numel() for p in student.factors.values()):,} parameters", flush=True)
    factors = nn.ParameterDict({name.replace(".", "/"): p for name, p in student.factors.items()})
    optimizer = torch.optim.AdamW(factors.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = Ema(factors, args.ema)
    checkpoint, step, seen, spent = args.folder / "lcm.pt", 0, 0, 0.0
    store = args.folder / "paths.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        factors.load_state_dict(state["factors"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow, ema.updates = state["ema"], state["ema_updates"]
        step, seen, spent = state["step"], state["paths"], state["spent"]

    def fresh(first: int) -> tuple[Tensor, Tensor, Tensor]:
        """64 paths, from noise or from where the student's first steps lead."""
        seed = 700_000_000 * (1 + args.seed) + seen
        captions, text = teacher.texts(64, seed)
        x = torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        if first:
            student.merge({name.replace("/", "."): p for name, p in ema.shadow.items()})
            x = generate(student, text.float(), x, angles, first)
        return teacher.path(captions, x, first), text, torch.full((64,), first)

    if store.exists():
        pool = Pool(*torch.load(store, weights_only=True))
    else:
        pool = Pool(*fresh(0))
        seen += 64
    while len(pool.first) < args.initial:
        pool.add(args.pool, *fresh(0))
        seen += 64
    judged = Judge(teacher.pipe, 256)
    log = Log(args.folder / "lcm.csv", ("step", "samples", "paths", "loss", "q1", "q2", "q3", "q4", "lr", "accuracy",
                                        "seconds"))
    progress = Progress(args.steps, args.deadline, spent)
    network = torch.compile(student.unet, dynamic=False) if args.compile else student.unet
    generator = torch.Generator().manual_seed(args.seed + 1000 * step)
    saved = read = time.time()
    history: list[Tensor] = []
    quarter = torch.arange(args.batch) % len(TIMES)
    while (fraction := progress.fraction(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate = cosine(step, fraction, args.lr, args.warmup)
        if step % args.every == args.every - 1:
            pool.add(args.pool, *fresh(step // args.every % len(TIMES)))
            seen += 64
        rows = pool.rows(quarter, generator)
        x, t, wanted = targets(pool.points, rows, quarter, angles)
        student.merge()
        with autocast():
            v = network(x.contiguous(memory_format=torch.channels_last), t, pool.text[rows].float()).sample.float()
        # pseudo-Huber in the norm of a picture (Song and Dhariwal 2023, equation 8)
        squares = (v - wanted).square().flatten(1).mean(1)
        losses = (squares + 0.03**2).sqrt() - 0.03
        losses.mean().backward()
        student.pull_back()
        nn.utils.clip_grad_norm_(factors.parameters(), 1.0, foreach=True)
        optimizer.step()
        ema.update(factors)
        history.append(squares.detach().view(-1, len(TIMES)).mean(0))
        step += 1
        now = time.time()
        if now - read > args.judge_every or step in (1, 25):
            read = now
            student.merge({name.replace("/", "."): p for name, p in ema.shadow.items()})
            latents = torch.cat([generate(student, c.float(), z, angles)
                                 for c, z in zip(judged.text.split(128), judged.noise.split(128))])
            means = torch.stack(history).mean(0)
            log.row(step=step, samples=step * args.batch, paths=seen, loss=float(means.mean()), lr=rate,
                    accuracy=judged(latents), seconds=progress.seconds,
                    **{f"q{i + 1}": float(m) for i, m in enumerate(means)})
            history.clear()
        if now - saved > args.save_every or progress.fraction(step) >= 1:
            saved = now
            save_atomic({"factors": factors.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.shadow,
                         "ema_updates": ema.updates, "step": step, "paths": seen, "spent": progress.seconds},
                        checkpoint)
            save_atomic((pool.points, pool.text, pool.first), store)


if __name__ == "__main__":
    main()

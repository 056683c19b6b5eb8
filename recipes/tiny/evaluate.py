"""Attribute accuracy of a tiny model on held-out captions, by the pixel judge, with its control.

    python recipes/tiny/evaluate.py --model ldmfast/assets/tiny --count 512

Runs the weights through diffusers' own networks and DDIM; one seed a caption, so a caption's picture does
not depend on its batch.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from common import psnr
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from ldmfast.testing.captions import Expected, expected_of
from ldmfast.testing.judge import read, verdict
from ldmfast.testing.scenes import Scene, render, sample_scenes

ATTRIBUTES = ("background", "count", "colour", "shape", "size", "relation")


@torch.inference_mode()
def generate(pipe: StableDiffusionPipeline, captions: list[str], guidance: float, steps: int, batch: int = 64,
             bf16: bool = True) -> Tensor:
    """(n, 3, 64, 64) pictures in [-1, 1]; caption i starts from the noise of seed i."""
    pipe.set_progress_bar_config(disable=True)
    out = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            images = pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=seeds,
                          output_type="pt").images
        out.append(images.float() * 2 - 1)
    return torch.cat(out)


def table(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """Share of true verdicts per attribute, their mean over attributes, and the share of all-correct pictures."""
    rows: dict[str, list[bool]] = defaultdict(list)
    for result in verdicts:
        for name, right in result.items():
            rows[name].append(right)
    shares = {name: sum(rows[name]) / len(rows[name]) for name in ATTRIBUTES if rows[name]}
    shares["mean"] = sum(shares.values()) / len(shares)
    shares["all correct"] = sum(all(v.values()) for v in verdicts) / len(verdicts)
    return shares


def counts(wanted: list[Expected]) -> dict[str, int]:
    """How many captions state each attribute."""
    stated = {name: len(wanted) for name in (*ATTRIBUTES, "all correct")}
    stated["size"] = sum(any(item.size_word for item in want.items) for want in wanted)
    stated["relation"] = sum(want.relation is not None for want in wanted)
    return stated


def contact_sheet(images: Tensor, path: Path, columns: int = 8) -> None:
    from PIL import Image

    rows = len(images) // columns
    grid = images[: rows * columns].unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    picture = Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())
    picture.resize((picture.width * 2, picture.height * 2), 0).save(path)


@torch.inference_mode()
def reconstructions(vae: torch.nn.Module, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """What the judge reads from the drawings, and from them after the autoencoder (printing its PSNR)."""
    drawn = render(scenes)
    again = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in drawn.split(64)]).clamp(-1, 1)
    rows = {}
    for name, pictures in (("drawn", drawn), ("autoencoder", again)):
        rows[name] = table([verdict(r, expected_of(s)) for r, s in zip(read(pictures), scenes)])
    print(f"autoencoder: {psnr(again, drawn):.2f} dB", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a diffusers folder")
    parser.add_argument("--folder", type=Path, help="a run's folder instead: its EMA weights in fp32")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--scenes", type=int, default=2024, help="seed of the scenes (1 chose the guidance)")
    parser.add_argument("--split", default="heldout")
    parser.add_argument("--style", default="varied")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--spacing", default=None, help="timestep spacing other than the folder's")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--reconstruct", action="store_true", help="also judge drawings and reconstructions")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.folder:
        from export import load_pipeline

        pipe, step = load_pipeline(args.folder)
        print("iterations", step)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    if args.spacing:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=args.spacing)
    scenes = sample_scenes(args.count, seed=args.scenes, split=args.split, style=args.style)
    wanted = [expected_of(scene) for scene in scenes]
    shuffled = random.Random(0).sample(wanted, len(wanted))
    rows = {}
    for guidance in args.guidance:
        images = generate(pipe, [scene.caption for scene in scenes], guidance, args.steps, bf16=not args.fp32)
        readings = read(images)
        rows[f"guidance {guidance:g}"] = table([verdict(r, w) for r, w in zip(readings, wanted)])
        rows[f"guidance {guidance:g}, wrong captions"] = table([verdict(r, w) for r, w in zip(readings, shuffled)])
        if args.sheet:
            contact_sheet(images[:64], args.sheet)
    if args.reconstruct:
        rows |= reconstructions(pipe.vae, scenes)
    for name, shares in rows.items():
        print(f"{name:32}" + " ".join(f"{key} {100 * value:5.1f}" for key, value in shares.items()), flush=True)
    if args.json:
        shipped = next(iter(rows.values()))
        record = {"captions": args.count, "split": args.split, "style": args.style, "steps": args.steps,
                  "guidance": args.guidance[0], "counts": counts(wanted), "shipped": shipped, "rows": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Attribute accuracy of the tiny diffusion transformer on held-out captions and on its classes, by the pixel judge.

    python recipes/tiny_dit/evaluate_dit.py --model ldmfast/assets/tiny_dit --count 512

Runs the weights through diffusers' own networks and Euler scheduler; one seed a caption, so a caption's picture does
not depend on its batch. The judge, its tables and the control are those of the shipped UNet (recipes/tiny).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from evaluate import contact_sheet, counts, table
from network import CLASSES
from torch import Tensor

from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import read, verdict
from ldmfast.testing.scenes import sample_scenes


@torch.inference_mode()
def generate(pipe: StableDiffusion3Pipeline, texts: dict[str, list[str]], guidance: float, steps: int,
             tokens: int, bf16: bool = True, batch: int = 64) -> Tensor:
    """(n, 3, 64, 64) pictures in [-1, 1] of prompt and, if given, prompt_2; picture i starts from seed i."""
    pipe.set_progress_bar_config(disable=True)
    out, count = [], len(texts["prompt"])
    for start in range(0, count, batch):
        part: dict[str, Any] = {name: column[start : start + batch] for name, column in texts.items()}
        seeds = [torch.Generator().manual_seed(i) for i in range(start, min(start + batch, count))]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            images = pipe(**part, num_inference_steps=steps, guidance_scale=guidance, generator=seeds,
                          max_sequence_length=tokens, output_type="pt").images
        out.append(images.float() * 2 - 1)
    return torch.cat(out)


def class_share(images: Tensor, names: list[str]) -> float:
    """Share of pictures with objects of the named class and no others."""
    right = [bool(r.items) and {f"{item.colour} {item.shape}" for item in r.items} == {name}
             for r, name in zip(read(images), names)]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a diffusers folder")
    parser.add_argument("--folder", type=Path, help="a run's folder instead: its EMA weights in fp32")
    parser.add_argument("--which", default="ema", choices=("ema", "model"))
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--scenes", type=int, default=2024, help="seed of the scenes (1 chose guidance and shift)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--shift", type=float, default=None, help="of the noise levels, other than the folder's")
    parser.add_argument("--tokens", type=int, default=1, help="max_sequence_length: how many null tokens")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--classes", type=int, default=0, help="pictures of each class")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.folder:
        from export_dit import load_pipeline

        pipe, step = load_pipeline(args.folder, args.which)
        print("iterations", step)
    else:
        pipe = StableDiffusion3Pipeline.from_pretrained(args.model, torch_dtype=torch.float32, text_encoder_3=None,
                                                        tokenizer_3=None)
    if args.shift is not None:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=args.shift)
    scenes = sample_scenes(args.count, seed=args.scenes, split="heldout")
    wanted = [expected_of(scene) for scene in scenes]
    shuffled = random.Random(0).sample(wanted, len(wanted))
    rows, by_class = {}, {}
    for guidance in args.guidance:
        settings = (guidance, args.steps, args.tokens, not args.fp32)
        images = generate(pipe, {"prompt": [scene.caption for scene in scenes]}, *settings)
        readings = read(images)
        rows[f"guidance {guidance:g}"] = table([verdict(r, w) for r, w in zip(readings, wanted)])
        rows[f"guidance {guidance:g}, wrong captions"] = table([verdict(r, w) for r, w in zip(readings, shuffled)])
        if args.classes:
            names = CLASSES * args.classes
            drawn = generate(pipe, {"prompt": [""] * len(names), "prompt_2": names}, *settings)
            by_class[f"guidance {guidance:g}"] = class_share(drawn, names)
        if args.sheet:
            contact_sheet(images[:64], args.sheet)
    for name, shares in rows.items():
        print(f"{name:32}" + " ".join(f"{key} {100 * value:5.1f}" for key, value in shares.items()), flush=True)
    print("classes right", by_class)
    if args.json:
        record = {"captions": args.count, "steps": args.steps, "tokens": args.tokens, "guidance": args.guidance[0],
                  "counts": counts(wanted), "shipped": next(iter(rows.values())), "rows": rows,
                  "classes": by_class, "class pictures": args.classes * len(CLASSES)}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Accuracy and speed of few steps against 20 steps with guidance, by the pixel judge, in one run.

    python recipes/tiny_lcm/evaluate_lcm.py --count 512 --json recipes/tiny_lcm/logs/evaluation.json

Everything is ldmfast's own whole call from text to pixels; one seed a caption. The pictures that are judged are made in
bf16. The times are of calls of one picture, the arms of all precisions in turn; a ratio is the median, over the
repetitions, of the time of the exact 20 steps to the arm's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from evaluate import contact_sheet, counts, table
from torch import Tensor

from ldmfast import Pipeline
from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import read, verdict
from ldmfast.testing.scenes import sample_scenes

EXACT, FEW = "20 steps, guidance 3", "LCM-LoRA, 4 steps"
LCM = {"guidance_scale": 1.0, "solver": "lcm"}
Arm = tuple[Pipeline, dict[str, Any]]


def arms(precision: str, lora: Path | None) -> dict[str, Arm]:
    """Name -> pipeline and the settings of its calls; the first is what the others are compared with."""
    base = Pipeline.tiny(precision=precision)
    few = Pipeline.tiny(precision=precision) if lora else Pipeline.tiny("lcm", precision=precision)
    if lora:
        few.load_lora_weights(lora)
        few.fuse_lora()
    found = {EXACT: (base, {}), "4 LCM steps without the LoRA": (base, LCM | {"num_inference_steps": 4})}
    for steps in (4, 2, 8):
        found[f"LCM-LoRA, {steps} step{'s'[:steps > 1]}"] = (few, LCM | {"num_inference_steps": steps})
    return found


def generate(pipe: Pipeline, captions: list[str], settings: dict[str, Any], batch: int = 64) -> Tensor:
    """(n, 3, 64, 64) in [-1, 1]; caption i starts from seed i."""
    parts = [pipe(captions[i:i + batch], generator=list(range(i, min(i + batch, len(captions)))), output_type="pt",
                  progress=False, **settings).images.float() for i in range(0, len(captions), batch)]
    return torch.cat(parts) * 2 - 1


def speeds(found: dict[str, Arm], captions: list[str], repeats: int
           ) -> dict[str, tuple[float, float]]:
    """Name -> (median seconds of a call, median ratio of the first arm's time to it)."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(-1, repeats):  # the first round warms up
        for name, (pipe, settings) in found.items():
            begin = time.perf_counter()
            pipe(captions[turn % len(captions)], generator=turn, output_type="pt", progress=False, **settings)
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    first = times[next(iter(found))]
    return {name: (statistics.median(row), statistics.median(a / b for a, b in zip(first, row)))
            for name, row in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora", type=Path, help="another LoRA than the shipped one")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--scenes", type=int, default=2024, help="seed of the scenes (1 watches the training)")
    parser.add_argument("--repeats", type=int, default=30, help="0: no times")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    scenes = sample_scenes(args.count, seed=args.scenes, split="heldout")
    captions, wanted = [scene.caption for scene in scenes], [expected_of(scene) for scene in scenes]
    timed: dict[str, tuple[float, float]] = {}
    if args.repeats:
        timed = speeds({f"{name}, {precision}": arm for precision in ("exact", "bf16")
                        for name, arm in arms(precision, args.lora).items() if name in (EXACT, FEW)},
                       captions[:16], args.repeats)
    for name, (seconds, ratio) in timed.items():
        print(f"{name:30}{1000 * seconds:7.1f} ms {ratio:6.2f}x", flush=True)
    rows = {}
    for name, (pipe, settings) in arms("bf16", args.lora).items():
        images = generate(pipe, captions, settings)
        rows[name] = table([verdict(r, w) for r, w in zip(read(images), wanted)])
        print(f"{name:30}" + " ".join(f"{k} {100 * v:5.1f}" for k, v in rows[name].items()), flush=True)
        if args.sheet and name == FEW:
            contact_sheet(images[:64], args.sheet)
    if args.json:
        record = {"captions": args.count, "scenes": args.scenes, "threads": torch.get_num_threads(),
                  "counts": counts(wanted), "rows": rows,
                  "milliseconds": {name: round(1000 * s, 2) for name, (s, _) in timed.items()},
                  "speed-up": {name: round(r, 2) for name, (_, r) in timed.items()}}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

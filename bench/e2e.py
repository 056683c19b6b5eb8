"""Whole calls, text to pixels, against diffusers on the same folder, interleaved in one run.

    python bench/e2e.py                        # the shipped model, 20 DDIM steps, every arm
    python bench/e2e.py --model FOLDER --steps 10 --repeats 7 --size 512

Every arm makes the same picture: same weights, prompt, seed, steps, solver, guidance and size. One repeat runs each
arm once, in turn; the table shows medians and the ratio of each arm to diffusers fp32 of the same run. The record goes
to bench/results/<device>/e2e.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from ops import commit, device_name, medians, write

import ldmfast


def arms(folder: Path, call: dict, seed: int) -> dict[str, Callable[[], Any]]:
    def theirs(dtype: torch.dtype) -> Callable[[], Any]:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.set_progress_bar_config(disable=True)
        return lambda: pipe(**call, generator=torch.Generator().manual_seed(seed))

    def ours(precision: str) -> Callable[[], Any]:
        pipe = ldmfast.Pipeline.from_pretrained(folder, precision=precision)
        return lambda: pipe(**call, generator=seed, solver="ddim", progress=False)

    return {"diffusers fp32": theirs(torch.float32), "diffusers bf16": theirs(torch.bfloat16),
            "ldmfast exact": ours("exact"), "ldmfast bf16": ours("bf16")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(ldmfast.__file__).parent / "assets" / "tiny")
    parser.add_argument("--prompt", default="a red circle above a blue square")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=None, help="pixels; default: the model's own")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    call = {"prompt": args.prompt, "num_inference_steps": args.steps, "guidance_scale": 4.0, "height": args.size,
            "width": args.size, "output_type": "np"}
    runs = arms(args.model, call, 0)
    found = medians("cpu", runs, args.repeats)
    base = found["diffusers fp32"]
    for name, value in found.items():
        print(f"{name:16s} {value:8.3f} s   {base / value:5.2f}x")
    record = {"device": device_name("cpu"), "threads": torch.get_num_threads(), "torch": torch.__version__,
              "diffusers": diffusers.__version__, "ldmfast": ldmfast.__version__, "commit": commit(),
              "model": args.model.name, "call": call, "repeats": args.repeats, "medians_s": found}
    print(f"written to {write(record, f'e2e-{args.model.name}.json')}")


if __name__ == "__main__":
    main()

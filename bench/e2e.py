"""Whole calls, text to pixels, against diffusers on the same folder, interleaved in one run.

    python bench/e2e.py                        # the shipped model, 20 DDIM steps, every arm
    python bench/e2e.py --model FOLDER --steps 10 --repeats 7 --size 512

Every arm makes the same picture: same weights, prompt, seed, steps, solver, guidance and size. One repeat runs each
arm once, in turn; the table shows medians, and how far the picture is from that of diffusers fp32 (relative RMS). The
record goes to bench/results/<device>/e2e-<model>.json. bench/peers.py --work tiny measures the shipped model with
these arms.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from ops import conditions, write
from race import Arm, Call, package, race
from torch import Tensor

import ldmfast

TINY = Path(ldmfast.__file__).parent / "assets" / "tiny"
PROMPT = "a red circle above a blue square"


def pipeline_arms(folder: Path, call: dict[str, Any], seed: int = 0) -> tuple[dict[str, Arm], Tensor]:
    """The arms, and the pictures of diffusers fp32 as (pictures, height, width, 3) in 0..1."""
    def theirs(dtype: torch.dtype) -> tuple[Call, dict[str, Any]]:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.set_progress_bar_config(disable=True)
        return lambda: torch.from_numpy(pipe(**call, generator=torch.Generator().manual_seed(seed)).images), {}

    def ours(precision: str) -> tuple[Call, dict[str, Any]]:
        pipe = ldmfast.Pipeline.from_pretrained(folder, precision=precision)
        return lambda: torch.from_numpy(pipe(**call, generator=seed, solver="ddim", progress=False).images), {}

    arms = {f"diffusers {name}": Arm(partial(theirs, dtype), package("diffusers"), f"eager, {name}, DDIM")
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    arms |= {f"ldmfast {name}": Arm(partial(ours, name), f"ldmfast {ldmfast.__version__}", f"precision={name}, ddim")
             for name in ("exact", "bf16", "int8")}
    return arms, theirs(torch.float32)[0]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=None, help="pixels; default: the model's own")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    call = {"prompt": args.prompt, "num_inference_steps": args.steps, "guidance_scale": 4.0, "height": args.size,
            "width": args.size, "output_type": "np"}
    arms, reference = pipeline_arms(args.model, call)
    rows = race(arms, reference, args.repeats, args.model.name)
    base = rows["diffusers fp32"].get("median_s", float("nan"))
    for name, row in rows.items():
        print(f"{name:16s} " + (f"not available: {row['unavailable']}" if "unavailable" in row else
                                f"{row['median_s']:8.3f} s {base / row['median_s']:6.2f}x   error {row['error']:.1e}"))
    record = {**conditions("cpu"), "diffusers": diffusers.__version__, "model": args.model.name, "call": call,
              "repeats": args.repeats, "arms": rows}
    print(f"written to {write(record, f'e2e-{args.model.name}.json')}")


if __name__ == "__main__":
    main()

"""Writes the EMA factors of a run as a LoRA file in diffusers' layout, fp16, with the settings it was made for.

    python recipes/tiny_lcm/export_lcm.py --folder runs/tiny_lcm --out ldmfast/assets/tiny_lcm
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from export import write_sums
from safetensors.torch import save_file
from student import TIMES, Student

SIZE_LIMIT = 2_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    state = torch.load(args.folder / "lcm.pt", weights_only=True)
    factors = {name.replace("/", "."): p for name, p in state["ema"].items()}
    tensors = {}
    for name, weight in Student(1, 1).base.items():
        up, down = factors[f"{name}.up"], factors[f"{name}.down"]
        if weight.ndim == 4:
            down, up = down.view(len(down), *weight.shape[1:]), up[:, :, None, None]
        tensors[f"unet.{name}.lora_A.weight"] = down.half().contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = up.half().contiguous()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    defaults = {"num_inference_steps": len(TIMES), "guidance_scale": 1.0, "solver": "lcm"}
    (args.out / "ldmfast.json").write_text(json.dumps(defaults, indent=2) + "\n")
    write_sums(args.out)
    size = file.stat().st_size
    print(f"{state['step']} iterations, {len(tensors)} tensors, {size:,} bytes")
    if size > SIZE_LIMIT:
        raise SystemExit(f"{file} is larger than {SIZE_LIMIT:,} bytes: train with smaller ranks")


if __name__ == "__main__":
    main()

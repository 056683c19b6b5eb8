"""Writes the EMA factors of a run as a LoRA file in diffusers' layout, fp16, with the settings it was made for.

    python recipes/tiny_lcm/export_lcm.py --folder runs/tiny_lcm --out ldmfast/assets/tiny_lcm
    python recipes/tiny_lcm/export_lcm.py --file lora.safetensors --out ldmfast/assets/tiny_lcm   # one written before

Every layer's product of factors is taken apart by singular values, and of all layers together those are kept that say
most for their numbers, until the file is as large as --limit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from export import write_sums
from safetensors.torch import load_file, save_file
from student import TIMES, Student

SIZE_LIMIT = 500_000
_HEADER = 32_000  # bytes, of some 240 tensors


def cut(tensors: dict[str, torch.Tensor], limit: int) -> dict[str, torch.Tensor]:
    """Factors ``<layer>.lora_A.weight`` and ``lora_B.weight`` of fewer ranks, in at most ``limit`` bytes of fp16."""
    parts = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            u, s, v = torch.linalg.svd(b.float().flatten(1) @ a.float().flatten(1), full_matrices=False)
            parts[key] = (u[:, :len(a)], s[:len(a)], v[:len(a)])
    ranks = dict.fromkeys(parts, 1)  # a layer keeps its name
    left = (limit - _HEADER) // 2 - sum(len(u) + v.shape[1] for u, _, v in parts.values())
    worth = sorted(((float(x) ** 2 / (len(u) + v.shape[1]), key, i) for key, (u, s, v) in parts.items()
                    for i, x in enumerate(s.tolist()) if i), reverse=True)
    for _, key, i in worth:
        u, _, v = parts[key]
        if len(u) + v.shape[1] <= left and ranks[key] == i:
            ranks[key], left = i + 1, left - len(u) - v.shape[1]
    out = {}
    for key, (u, s, v) in parts.items():
        n, root = ranks[key], s[:ranks[key]].sqrt()
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        out[key] = (root[:, None] * v[:n]).view(n, *a.shape[1:]).half().contiguous()
        out[key.replace("lora_A", "lora_B")] = (u[:, :n] * root).view(len(b), n, *b.shape[2:]).half().contiguous()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path, help="of a run")
    source.add_argument("--file", type=Path, help="a LoRA written before")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=SIZE_LIMIT, help=f"bytes of the file ({SIZE_LIMIT:,})")
    args = parser.parse_args()
    tensors = load_file(args.file) if args.file else read_run(args.folder)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "pytorch_lora_weights.safetensors"
    save_file(cut(tensors, args.limit), file, metadata={"format": "pt"})
    defaults = {"num_inference_steps": len(TIMES), "guidance_scale": 1.0, "solver": "lcm"}
    (args.out / "ldmfast.json").write_text(json.dumps(defaults, indent=2) + "\n")
    write_sums(args.out)
    size = file.stat().st_size
    print(f"{len(tensors)} tensors, {size:,} bytes")
    if size > args.limit:
        raise SystemExit(f"{file} is larger than {args.limit:,} bytes: one rank a layer is already more")


def read_run(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "lcm.pt", weights_only=True)
    factors = {name.replace("/", "."): p for name, p in state["ema"].items()}
    tensors = {}
    for name, weight in Student(1, 1).base.items():
        up, down = factors[f"{name}.up"], factors[f"{name}.down"]
        if weight.ndim == 4:
            down, up = down.view(len(down), *weight.shape[1:]), up[:, :, None, None]
        tensors[f"unet.{name}.lora_A.weight"] = down.half().contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = up.half().contiguous()
    return tensors


if __name__ == "__main__":
    main()

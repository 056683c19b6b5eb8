"""Writes the EMA weights of a run as a diffusers StableDiffusion3Pipeline folder in fp16.

    python recipes/tiny_dit/export_dit.py --folder runs/tiny_dit --out ldmfast/assets/tiny_dit

Files that the folder has in common with the shipped UNet's (autoencoder, tokenizer), and the second caption encoder,
which is the first one, are links. `--whole` writes copies in their place: a folder that can be moved.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from export import write_sums
from network import SHIPPED, Velocity, load_text_encoder, load_tokenizer, load_vae

DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 3.0}
SIZE_LIMIT = 8_000_000


def load_pipeline(folder: Path, which: str = "ema", shift: float = 1.0) -> tuple[StableDiffusion3Pipeline, int]:
    """The pipeline of a run (fp32) and its iterations; `which` is "ema" or "model" (the raw weights)."""
    model = Velocity()
    state = torch.load(folder / "dit.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(state[which], strict=False)  # the EMA has no position table, which is fixed
    transformer = model.net.eval()
    for block in transformer.transformer_blocks:
        block.attn.set_processor(JointAttnProcessor2_0())
    text, tokenizer = load_text_encoder(), load_tokenizer()
    vae = load_vae()
    vae.register_to_config(shift_factor=0.0)  # the pipeline of diffusers adds it, and takes no null
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=vae,
        text_encoder=text, tokenizer=tokenizer, text_encoder_2=text, tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None)
    return pipe, int(state["step"])


def write_folder(pipe: StableDiffusion3Pipeline, out: Path) -> None:
    """A whole diffusers folder in fp16; what transformers reads by itself comes up in fp32."""
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2"):
        config = out / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    config = out / "vae" / "config.json"  # diffusers writes where it read the autoencoder
    known = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
    config.write_text(json.dumps(known, indent=2) + "\n")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(out / name)
        shutil.copytree(SHIPPED / "tokenizer", out / name)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)


def link_shared(out: Path) -> None:
    """A link in place of every file that the shipped UNet's folder has, too, or that came before; and shared.json,
    which says the same of parts for wheels, which cannot hold links (ldmfast/checkpoints/folder.py)."""
    known = {p.read_bytes(): p for p in SHIPPED.rglob("*") if p.is_file()}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        first = known.setdefault(path.read_bytes(), path)
        if first is not path:
            path.unlink()
            path.symlink_to(os.path.relpath(first, path.parent))
    shared = {p.relative_to(out).parts[0]: os.path.relpath(p.resolve().parent, SHIPPED.resolve().parent)
              for p in sorted(out.rglob("*")) if p.is_symlink()}
    (out / "shared.json").write_text(json.dumps(shared, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=DEFAULTS["guidance_scale"])
    parser.add_argument("--shift", type=float, default=1.0, help="of the scheduler's noise levels")
    parser.add_argument("--whole", action="store_true", help="copies in place of links")
    args = parser.parse_args()
    pipe, step = load_pipeline(args.folder, shift=args.shift)
    if args.out.exists():
        shutil.rmtree(args.out)
    write_folder(pipe, args.out)
    if not args.whole:
        link_shared(args.out)
    defaults = {**DEFAULTS, "guidance_scale": args.guidance}
    (args.out / "ldmfast.json").write_text(json.dumps(defaults, indent=2) + "\n")
    write_sums(args.out)
    total = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file() and not p.is_symlink())
    print(f"{args.out}: {total:,} bytes, weights after {step} iterations")
    if total > SIZE_LIMIT and not args.whole:
        raise SystemExit(f"{total:,} bytes are over the limit of {SIZE_LIMIT:,}: use a smaller network.CONFIG")


if __name__ == "__main__":
    main()

"""Writes the EMA weights of a run as a diffusers StableDiffusionPipeline folder in fp16.

    python recipes/tiny/export.py --folder runs/tiny --out ldmfast/assets/tiny
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from common import SAMPLING, SCHEDULE
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tokenizer import build_tokenizer
from train_unet import TextToLatent, load_vae

DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 3.0, "solver": "ddim"}
SIZE_LIMIT = 11_500_000


def load_pipeline(folder: Path, which: str = "ema") -> tuple[StableDiffusionPipeline, int]:
    """The pipeline of a run (fp32) and its iterations; `which` is "ema" or "model" (the raw weights)."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    model = TextToLatent(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    state = torch.load(folder / "unet.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(state[which])
    model.unet.set_default_attn_processor()
    vae = load_vae(folder).to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=1.0)  # the latents are whitened inside the VAE
    scheduler = DDIMScheduler(**SCHEDULE, **SAMPLING)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text.eval(),
        tokenizer=tokenizer,
        unet=model.unet.eval().to(memory_format=torch.contiguous_format),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, int(state["step"])


def write_sums(folder: Path) -> None:
    """SHA256SUMS of every other file: the test of the assets compares them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=DEFAULTS["guidance_scale"])
    args = parser.parse_args()
    pipe, step = load_pipeline(args.folder)
    if args.out.exists():
        shutil.rmtree(args.out)
    pipe.to(torch.float16).save_pretrained(args.out, safe_serialization=True)
    # The slow CLIP files are enough for transformers and for us; tokenizer.json only repeats them.
    build_tokenizer(args.out / "tokenizer")
    (args.out / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    # transformers loads in the dtype that the config names: without this the text encoder would come up in
    # fp16 beside an fp32 UNet, and the pipeline of diffusers fails.
    config = args.out / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for path in args.out.rglob("*.safetensors"):
        path.chmod(0o644)
    defaults = {**DEFAULTS, "guidance_scale": args.guidance}
    (args.out / "ldmfast.json").write_text(json.dumps(defaults, indent=2) + "\n")
    write_sums(args.out)
    total = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {total:,} bytes, weights after {step} iterations")
    if total > SIZE_LIMIT:
        raise SystemExit(f"{total:,} bytes are over the limit of {SIZE_LIMIT:,}: use smaller widths in common.py")


if __name__ == "__main__":
    main()

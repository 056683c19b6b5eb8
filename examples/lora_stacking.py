"""Several LoRAs at once: loaded, weighted, swapped between calls and within a batch, fused and taken out again.

    python examples/lora_stacking.py [--lora FILE ...] [--precision exact|bf16|int8] [--out pictures.png]

Without files it makes two small random ones for the model that ships with ldmfast, in kohya's layout: they spoil the
picture in two ways, which is enough to see who is at work. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import ldmfast
from ldmfast.models.gemm import Linear

PROMPT = "a red circle above a blue square"


def random_lora(pipe: ldmfast.Pipeline, file: Path, seed: int, rank: int = 4) -> Path:
    """A LoRA of the attentions' outputs."""
    noise, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in pipe.unet.named_modules():
        if isinstance(layer, Linear) and name.endswith("to_out.0"):
            stem = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, layer.in_features, generator=noise) * 0.1
            tensors[f"{stem}.lora_up.weight"] = torch.randn(layer.out_features, rank, generator=noise) * 0.1
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", type=Path, nargs="*", default=[], help="LoRA files for the shipped model")
    parser.add_argument("--precision", default="exact", choices=("exact", "bf16", "int8"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("pictures.png"))
    a = parser.parse_args()

    pipe = ldmfast.Pipeline.tiny(precision=a.precision)

    def draw(loras: object = None) -> np.ndarray:
        return np.asarray(pipe(PROMPT, generator=1, num_inference_steps=a.steps, loras=loras, progress=False).images[0])

    with tempfile.TemporaryDirectory() as folder:
        files = a.lora or [random_lora(pipe, Path(folder) / f"{name}.safetensors", seed)
                           for seed, name in enumerate(("first", "second"))]
        for file in files:
            pipe.load_lora_weights(file, adapter_name=file.stem)
    names = [file.stem for file in files]
    print(f"loaded: {pipe.get_list_adapters()}, active: {pipe.get_active_adapters()}")

    base = draw({})
    start = time.perf_counter()
    pipe.set_adapters(names, [0.5] * len(names))
    print(f"all at half strength: set in {(time.perf_counter() - start) * 1e3:.1f} ms")
    pictures = {"base": base, **{name: draw(name) for name in names}, "all, half": draw()}
    pipe.fuse_lora()
    print(f"fused: differs from the side path by {np.abs(draw().astype(int) - pictures['all, half']).max()} of 255")
    pipe.unfuse_lora()

    each = [{}, *names]  # one for each picture of a batch
    batch = pipe([PROMPT] * len(each), generator=[1] * len(each), num_inference_steps=a.steps, loras=each,
                 progress=False).images
    same = all(np.array_equal(x, pictures[name]) for x, name in zip(batch, ["base", *names]))
    print(f"a batch with {len(each)} different choices: {'the same, bit for bit' if same else 'other pictures'}")
    pipe.unload_lora_weights()
    print(f"unloaded: {'the base again, bit for bit' if np.array_equal(draw(), base) else 'not the base'}")
    Image.fromarray(np.concatenate(list(pictures.values()), axis=1)).save(a.out)
    print(f"saved {a.out}: {', '.join(pictures)}")


if __name__ == "__main__":
    main()

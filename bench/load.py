"""From a checkpoint on disk to the first denoising step done, in this fresh process: seconds, and memory at its peak.

    python bench/load.py FOLDER --library ldmfast --precision bf16      # or --library diffusers; prints one JSON line

bench/peers.py --work load calls it for each arm. FOLDER is a Stable Diffusion folder. Seconds run from after the
imports to the latents of one step (batch 2, guidance); the peak is resident memory over what the imports left, once
until everything is loaded and once with the step. All of it counts: also pages of the libraries' files, of which
file_bytes came in meanwhile. The kept bytes are those of the networks' tensors (2 a number in bf16; in int8 what the
plan, the text encoder and the VAE keep in bf16 counts as that).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer  # noqa: F401 - imported lazily otherwise, within the time


def resident(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def kept_bytes(pipe: Any) -> int:
    """Of all distinct tensors in the networks of a pipeline."""
    found: dict[int, int] = {}
    for network in pipe.components.values():
        for module in network.modules() if isinstance(network, torch.nn.Module) else ():
            held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
            for tensor in (getattr(x, "held", (None, x))[1] for x in held):  # a convolution's layout holds its weight
                if isinstance(tensor, torch.Tensor):
                    found[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def stored_elements(folder: Path) -> int:
    """Numbers in all weight files, from their headers."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        total += sum(torch.Size(t["shape"]).numel() for name, t in header.items() if name != "__metadata__")
    return total


def first_step(library: str, folder: Path, precision: str) -> dict[str, Any]:
    call = {"num_inference_steps": 1, "guidance_scale": 7.5, "output_type": "latent",
            "generator": torch.Generator().manual_seed(0)}
    if library == "ldmfast":
        import ldmfast

        def load() -> Any:
            return ldmfast.Pipeline.from_pretrained(folder, precision=precision)

        call |= {"solver": "ddim", "progress": False}
    else:
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
        dtype = torch.float32 if precision == "exact" else torch.bfloat16

        def load() -> Any:
            pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
            pipe.set_progress_bar_config(disable=True)
            return pipe

    before, files = resident("VmRSS"), resident("RssFile")
    Path("/proc/self/clear_refs").write_text("5")  # forget the imports' peak
    start = time.perf_counter()
    pipe = load()
    loaded, loading = time.perf_counter(), resident("VmHWM") - before
    latents = pipe("a red circle above a blue square", **call).images
    done = time.perf_counter()
    peak = resident("VmHWM") - before
    kept = kept_bytes(pipe) if library == "ldmfast" else stored_elements(folder) * {"exact": 4, "bf16": 2}[precision]
    return {"seconds": done - start, "load_s": loaded - start, "peak_bytes": peak, "after_bytes":
            resident("VmRSS") - before, "kept_bytes": kept, "peak_over_kept": peak / kept,
            "loading_over_kept": loading / kept, "file_bytes": resident("RssFile") - files,
            "latents": torch.as_tensor(latents).float().tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--library", choices=("ldmfast", "diffusers"), default="ldmfast")
    parser.add_argument("--precision", default="bf16", help="exact, bf16 or int8 (int8: ldmfast only)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(first_step(options.library, options.folder, options.precision)))


if __name__ == "__main__":
    main()

"""LoRA on an SD 1.5 UNet of random weights: how long a swap takes, and what the side path costs a step.

    python bench/lora.py                        # writes bench/results/<device>/lora.json
    python bench/lora.py --repeats 15 --no-write
    python bench/lora.py --busy                 # others use the machine too: one thread, its own CPU time

Two LoRAs in kohya's layout and fp16, on every linear and 1x1 convolution of the transformer blocks (what kohya trains).
swap: ``pipe.set_adapters`` between adapters that are loaded, on the side path, so that the next call has them: to the
other one, to the other one with a weight, and to both at once. load: from a file. step: one evaluation (batch 2, 64x64
latents, 77 tokens) with one adapter on the side path, and fused, as ratios to the step without, taken in turn; and how
far the two results are apart.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from arms import SD15_UNET, random_model
from ops import conditions, medians, write
from safetensors.torch import save_file

import ldmfast
from ldmfast.loras.adapter import Slot, slots
from ldmfast.pipelines.load import Components
from ldmfast.samplers import Schedule

SWAP_RANK, STEP_RANK = 64, 16
LIMIT_MS = 50.0  # of a swap


def pipeline(precision: str) -> ldmfast.Pipeline:
    unet = ldmfast.models.from_diffusers(random_model(diffusers.UNet2DConditionModel, SD15_UNET), precision=precision)
    gc.collect()
    parts = Components(unet, None, (), Schedule.from_config({"_class_name": "DDIMScheduler"}), {})
    return ldmfast.Pipeline(parts, precision=precision, device=torch.device("cpu"), source="random")


def trained(slot: Slot) -> bool:
    return "transformer_blocks" in slot.path or slot.path.endswith(("proj_in", "proj_out"))


def lora(pipe: ldmfast.Pipeline, rank: int, seed: int) -> dict[str, torch.Tensor]:
    noise, found = torch.Generator().manual_seed(seed), {}
    for name, slot in slots(pipe.unet).items():
        if "attentions" in name and trained(slot):
            stem, (out, channels) = f"lora_unet_{name.replace('.', '_')}", slot.shape
            found[f"{stem}.lora_down.weight"] = (torch.randn(rank, channels, generator=noise) * channels**-0.5).half()
            found[f"{stem}.lora_up.weight"] = (torch.randn(out, rank, generator=noise) * 0.05).half()
            found[f"{stem}.alpha"] = torch.tensor(rank / 2.0)
    return found


def swaps(pipe: ldmfast.Pipeline, timer: str, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        weights = lora(pipe, SWAP_RANK, 0)
        save_file(weights, file)
        pipe.load_lora_weights(file, "a")
        pipe.load_lora_weights(lora(pipe, SWAP_RANK, 1), "b")
        base = pipe.loaded.loras.base["unet"]
        packed = [id(p) for p in base.parameters()]

        def load() -> None:
            pipe.load_lora_weights(file, "c")
            pipe.delete_adapters("c")

        def there_and_back(*to: Any) -> Callable[[], None]:
            def call() -> None:
                pipe.set_adapters(*to)
            return call

        found = medians(timer, {
            "swap to the other": there_and_back("a"), "swap to the other, weight 0.8": there_and_back("b", 0.8),
            "swap to both, weights 0.7": there_and_back(["a", "b"], 0.7), "load from a file": load}, repeats)
        kept = {id(p) for p in pipe.unet.parameters()}
        assert all(i in kept for i in packed), "a packed weight was rebuilt"
    size = sum(t.numel() * t.element_size() for t in weights.values()) / 2**20
    return {"rank": SWAP_RANK, "file_mib": round(size, 1), "matrices": len(weights) // 3, "limit_ms": LIMIT_MS,
            **{f"{name} ms": round(s * 1e3, 2) for name, s in found.items()}}


def steps(pipe: ldmfast.Pipeline, timer: str, repeats: int) -> dict[str, Any]:
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora(pipe, STEP_RANK, 2), "a")
    stack = pipe.loaded.loras
    assert stack is not None
    networks = {"without": stack.base["unet"], "side path": pipe.unet,
                "fused": stack.fuse(None, None, 1.0).networks(())["unet"]}
    noise = torch.Generator().manual_seed(0)
    sample, prompt = torch.randn(2, 4, 64, 64, generator=noise), torch.randn(2, 77, 768, generator=noise)
    states = {name: network.prepare(500.0, prompt) for name, network in networks.items()}
    found = medians(timer, {name: lambda n=network, s=states[name]: n(sample, 500.0, state=s)
                            for name, network in networks.items()}, repeats)
    plain, side, fused = (network(sample, 500.0, state=states[name]).float() for name, network in networks.items())
    apart = float((side - fused).norm() / (fused - plain).norm())
    return {"rank": STEP_RANK, "side path less fused, over what adapters change": round(apart, 4),
            **{f"{name} ms": round(s * 1e3, 1) for name, s in found.items()},
            **{f"{name} ratio": round(found[name] / found["without"], 3) for name in ("side path", "fused")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="*", default=["bf16", "int8"], choices=["exact", "bf16", "int8"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; each arm runs once a round")
    parser.add_argument("--busy", action="store_true", help="one CPU thread, timed by the CPU time it got")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    timer = "cpu-time" if options.busy else "cpu"
    torch.set_num_threads(1 if options.busy else options.threads)
    rows: list[dict[str, Any]] = []
    for precision in options.precision:
        with torch.inference_mode():
            pipe = pipeline(precision)
            rows.append({"precision": precision})
            for name, part in (("swap", swaps), ("step", steps)):
                rows[-1][name] = part(pipe, timer, options.repeats)
                print(f"{precision} {name}: " + ", ".join(f"{k} {v}" for k, v in rows[-1][name].items()), flush=True)
        del pipe
    if not options.no_write:
        record = {**conditions("cpu"), "clock": "thread CPU time" if options.busy else "wall",
                  "repeats": options.repeats, "rows": rows}
        print(f"written to {write(record, 'lora.json')}")


if __name__ == "__main__":
    main()

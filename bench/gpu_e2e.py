"""Whole calls on a GPU, latents to pixels: ldmfast (eager, and its graphs) against diffusers, eager and compiled.

    python bench/gpu_e2e.py --model sdxl --batch 1 --arms ours eager
    python bench/gpu_e2e.py --model sd15 --batch 1 --arms ours eager compiled --steps 50
    python bench/gpu_e2e.py --model small --device cpu --steps 2 --rounds 1       # a dry run

All arms share one set of random weights, start and prompt embeddings, in one process; rounds take the arms in turn.
Each call runs the solver (DDIM), guidance and the decoder, on embeddings, so text encoders count for none. ``it_s``:
steps a second of the loop alone, from a call without decoding. The record gpu-e2e-<model>-b<batch>.json is written
after every arm: what is killed by a time limit leaves what it had. unet_error: relative RMS of the UNet's output
against the same weights in fp32; apart: of the last latents from diffusers eager's, which has errors of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from gpu_models import MODELS, SCHEDULE, Model, embeddings, modules, pipeline
from ops import clock, conditions, in_turn, result_path
from race import package, reason, relative_rms

from ldmfast.engine import Engine, RecordedGraphs

Call = Callable[[bool], Any]  # called with whether to decode


class Bench:
    """Weights, embeddings and start of one model and batch; ``arm`` builds one way to run them."""

    def __init__(self, model: Model, dtype: torch.dtype, device: str, batch: int, steps: int) -> None:
        self.model, self.dtype, self.device, self.steps = model, dtype, device, steps
        self.parts = modules(model, dtype, device)
        self.call = {**embeddings(model, dtype, device, batch), "num_inference_steps": steps, "guidance_scale": 5.0,
                     "height": model.size, "width": model.size}
        side = model.size // 2 ** (len(model.vae["block_out_channels"]) - 1)
        self.start = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)

    def arm(self, name: str) -> tuple[Call, str]:
        return {"ours": self.ours, "ours eager": lambda: self.ours(graphs=False), "eager": self.theirs,
                "ours fp8": lambda: self.ours(eight="fp8"), "ours int8": lambda: self.ours(eight="int8"),
                "ours fp8 attention": lambda: self.ours(eight="fp8", attention=True),
                "compiled": lambda: self.theirs(compiled=True)}[name]()

    def ours(self, graphs: bool = True, eight: str | None = None, attention: bool = False) -> tuple[Call, str]:
        """attention: that in fp8, too."""
        pipe = pipeline(self.model, self.dtype, self.device, self.parts, eight)
        pipe.unet.attend_in_fp8(attention)
        if not graphs:
            pipe.engine = None
        elif self.device == "cpu":
            pipe.engine = Engine(RecordedGraphs())
        self.pipe, kind = pipe, next(pipe.unet.parameters()).dtype
        given = {k: v.to(kind) if isinstance(v, torch.Tensor) else v for k, v in self.call.items()}

        def call(decode: bool) -> Any:
            return pipe(**given, latents=self.start, solver="ddim", progress=False,
                        output_type="pt" if decode else "latent").images

        return call, f"precision={pipe.precision}, {'one graph a step' if graphs else 'eager'}"

    def theirs(self, compiled: bool = False) -> tuple[Call, str]:
        unet, vae = self.parts
        names = {"vae": vae, "unet": unet, "text_encoder": None, "tokenizer": None,
                 "scheduler": diffusers.DDIMScheduler.from_config(SCHEDULE)}
        if self.model.large:
            pipe = diffusers.StableDiffusionXLPipeline(**names, text_encoder_2=None, tokenizer_2=None,
                                                       add_watermarker=False)
        else:
            pipe = diffusers.StableDiffusionPipeline(**names, safety_checker=None, feature_extractor=None,
                                                     requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        how = "eager"
        if compiled:
            options: dict[str, Any] = {"mode": "max-autotune"} if self.device == "cuda" else {"backend": "eager"}
            unet.to(memory_format=torch.channels_last)
            pipe.unet = torch.compile(unet, fullgraph=True, **options)
            pipe.vae.decode = torch.compile(vae.decode, **options)
            how = f"torch.compile {options}, channels_last"

        def call(decode: bool) -> Any:
            return pipe(**self.call, latents=self.start.to(self.dtype), output_type="pt" if decode else "latent").images

        return call, f"diffusers, {how}, {str(self.dtype)[6:]}, VAE {vae.dtype}"

    def errors(self) -> dict[str, float]:
        """Of one UNet evaluation in this dtype, ours and diffusers', against the same weights in fp32."""
        unet, call = self.parts[0], self.call
        x = torch.cat([self.start] * 2)[:2].to(self.dtype)
        text = torch.cat([call["negative_prompt_embeds"][:1], call["prompt_embeds"][:1]])
        added = None
        if self.model.large:
            pooled = torch.cat([call["negative_pooled_prompt_embeds"][:1], call["pooled_prompt_embeds"][:1]])
            added = {"text_embeds": pooled, "time_ids": torch.ones(2, 6, device=x.device, dtype=x.dtype)}
        with torch.inference_mode():
            kind = next(self.pipe.unet.parameters()).dtype
            own = {k: v.to(kind) for k, v in (added or {}).items()} or None
            ours = self.pipe.unet(x.to(kind), 500.0, text.to(kind), added_cond_kwargs=own)
            theirs = unet(x, 500.0, text, added_cond_kwargs=added, return_dict=False)[0]
            exact = {k: v.float() for k, v in (added or {}).items()} or None
            unet.float()
            wanted = unet(x.float(), 500.0, text.float(), added_cond_kwargs=exact, return_dict=False)[0]
            unet.to(self.dtype)
        return {"ours": relative_rms(ours.float(), wanted), "diffusers": relative_rms(theirs.float(), wanted)}


def timed(call: Call, decode: bool, device: str) -> float:
    return clock(device, lambda: call(decode))


def start(bench: Bench, name: str) -> tuple[Call, dict[str, Any]]:
    """Builds an arm and makes its first calls: a new shape's whole price, and the memory it takes."""
    begin = time.perf_counter()
    call, settings = bench.arm(name)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = timed(call, True, bench.device)
    row = {"settings": settings, "startup_s": time.perf_counter() - begin, "first_call_s": first}
    finite = call(True)
    if not bool(torch.isfinite(torch.as_tensor(finite)).all()):
        raise ValueError("the pictures are not finite")
    if bench.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return call, row


def measure(bench: Bench, arms: list[str], rounds: int, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    calls: dict[str, Call] = {}
    latents: dict[str, torch.Tensor] = {}
    batch = len(bench.start)
    for name in arms:
        try:
            calls[name], rows[name] = start(bench, name)
            latents[name] = calls[name](False).float()
            if name in ("ours", "ours fp8", "ours int8", "ours fp8 attention"):
                rows[name]["unet_error"] = bench.errors()
        except Exception as error:  # whatever stops one arm is told in its row, and the others go on
            rows[name] = {"unavailable": reason(error)}
            gc.collect()
        save(rows)
    for name, x in latents.items():
        rows[name]["apart"] = relative_rms(x, latents["eager"]) if "eager" in latents else None
    times: dict[tuple[str, bool], list[float]] = {(n, d): [] for n in calls for d in (True, False)}
    for name in in_turn(calls, rounds):
        for decode in (True, False):
            times[name, decode].append(timed(calls[name], decode, bench.device))
        whole, loop = (statistics.median(times[name, d]) for d in (True, False))
        rows[name] |= {"call_s": whole, "repeats_s": times[name, True], "it_s": bench.steps / loop,
                       "img_s": batch / whole}
        save(rows)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", choices=sorted(set(MODELS) - {"tiny"}))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", default=["ours", "eager"],
                        choices=["ours", "ours eager", "ours fp8", "ours int8", "ours fp8 attention", "eager",
                                 "compiled"])
    parser.add_argument("--out", type=Path, default=None, help="folder (default: bench/results/<device>)")
    args = parser.parse_args()
    facts = conditions(args.device)
    folder = args.out or result_path(facts["device"], "").parent
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, args.dtype or ("float16" if args.device == "cuda" else "float32"))
    missing = False
    for batch in args.batch:
        bench = Bench(MODELS[args.model], dtype, args.device, batch, args.steps)
        kind = "-compiled" if "compiled" in args.arms else ""
        path = folder / f"gpu-e2e-{args.model}-b{batch}{kind}.json"
        record = {**facts, "diffusers": package("diffusers"), "triton": package("triton"), "model": args.model,
                  "batch": batch, "steps": args.steps, "size": bench.model.size, "dtype": str(dtype)[6:],
                  }

        def save(rows: dict[str, Any], record: dict[str, Any] = record, path: Path = path) -> None:
            path.write_text(json.dumps({**record, "arms": rows}, indent=1) + "\n")

        rows = measure(bench, args.arms, args.rounds, save)
        base = rows.get("eager", {}).get("call_s")
        for name, row in rows.items():
            print(f"{args.model} b{batch} {name:11s} " + (
                f"not available: {row['unavailable']}" if "unavailable" in row else
                f"{row['call_s']:8.3f} s {row['it_s']:8.2f} it/s {row['img_s']:7.3f} img/s"
                + (f" {base / row['call_s']:6.2f}x eager" if base else "")), flush=True)
        missing = missing or any("unavailable" in row for row in rows.values())
        del bench
        gc.collect()
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())

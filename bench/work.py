"""What bench/peers.py measures: each work item yields its cases, with every arm's row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
import diffusers
import joint_arms
import torch
import transformers
from e2e import PROMPT, TINY, pipeline_arms
from ops import in_turn
from race import Arm, add_times, package, race, reason, relative_rms
from torch import Tensor
from tqdm import tqdm

import ldmfast

ATTENTION = ((2, 8, 4096, 40), (2, 10, 4096, 64), (2, 8, 1024, 80), (1, 24, 1024, 128))  # batch, heads, tokens, dim
Found = tuple[str, dict[str, Any]]  # a case's name, and its part of the record


@dataclass(frozen=True)
class Run:
    """threads and repeats of every arm; words: only arms whose name holds one of them (none: all); cache: a folder."""

    threads: int
    repeats: int
    cache: Path
    words: tuple[str, ...] = ()

    def wants(self, arm: str) -> bool:
        return not self.words or any(word.lower() in arm.lower() for word in self.words)

    def race(self, case: str, entrants: Mapping[str, Arm], reference: Tensor, note: str) -> Found:
        rows = race({k: v for k, v in entrants.items() if self.wants(k)}, reference, self.repeats, case)
        return case, {"note": note, "arms": rows}


def attention(run: Run) -> Iterator[Found]:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for shape in ATTENTION:
            yield attention_case(run, f"attention {name} {shape}", shape, dtype)


def attention_case(run: Run, case: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Found:
    noise = torch.Generator().manual_seed(0)
    batch, heads, tokens, head_dim = shape
    q, k, v = torch.randn(3, batch, tokens, heads, head_dim, generator=noise).to(dtype).unbind()
    theirs = [x.transpose(1, 2) for x in (q, k, v)]
    packed = [x.contiguous() for x in theirs]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    entrants = {
        "torch": Arm(lambda: (lambda: sdpa(*theirs).transpose(1, 2), {}), package("torch"), "SDPA, as diffusers calls"),
        "OpenVINO": arms.openvino_attention(*packed, run.threads),
        "ldmfast": Arm(lambda: (lambda: ldmfast.ops.attention(q, k, v), {}), f"ldmfast {ldmfast.__version__}", ""),
    }
    found = entrants["OpenVINO"]

    def transposed() -> Any:
        call, facts = found.build()
        return lambda: call().transpose(1, 2), facts

    entrants["OpenVINO"] = Arm(transposed, found.version, found.settings)
    reference = sdpa(*(x.float() for x in theirs)).transpose(1, 2)
    return run.race(case, entrants, reference, "(batch, heads, tokens, head_dim); each in the layout it likes best")


def group_norm_silu(run: Run) -> Iterator[Found]:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 320, 64, 64, generator=noise).bfloat16().to(memory_format=torch.channels_last)
    weight, bias = torch.rand(2, 320, generator=noise).bfloat16().unbind()
    target = torch.empty_like(x)
    peer = ldmfast.ops.ROWS["group_norm_silu"].peer
    entrants = {
        "plain copy": Arm(lambda: (lambda: target.copy_(x), {}), package("torch"), "Tensor.copy_", compared=False),
        "torch": Arm(lambda: (lambda: peer(x, None, 32, weight, bias, 1e-5, True), {}), package("torch"),
                     "group_norm, silu"),
        "ldmfast": Arm(lambda: (lambda: ldmfast.ops.group_norm_silu(x, 32, weight, bias), {}),
                       f"ldmfast {ldmfast.__version__}", ""),
    }
    reference = peer(x.float(), None, 32, weight.float(), bias.float(), 1e-5, True)
    yield run.race("group_norm_silu bf16 2x320x64x64", entrants, reference, "channels-last, 32 groups")


def sd15(run: Run) -> Iterator[Found]:
    yield unet_case(run, "sd15", arms.SD15_UNET, 64)


def unet_case(run: Run, case: str, config: dict[str, Any], size: int) -> Found:
    """Every arm on one UNet. What needs most memory to start comes first."""
    net = arms.unet(config, size)
    entrants = {f"OpenVINO {p}": arms.openvino(net, p, run.cache, run.threads) for p in ("int8", "bf16", "f32")}
    entrants["torch.compile bf16"] = arms.compiled(net)
    entrants |= {"diffusers fp32": arms.eager(net, torch.float32), "diffusers bf16": arms.eager(net, torch.bfloat16)}
    entrants |= {f"ldmfast {p}": arms.ours(net, p) for p in ("exact", "bf16", "int8")}
    return run.race(case, entrants, net.reference, f"UNet step, 2x4x{size}x{size} latents, 77 prompt tokens")


def sdxl(run: Run) -> Iterator[Found]:
    net = arms.unet(arms.SDXL_UNET, 64, low_only=True)
    entrants = {"diffusers bf16": arms.eager(net, torch.bfloat16)}
    entrants |= {f"ldmfast {p}": arms.ours(net, p) for p in ("bf16", "int8")}
    yield run.race("sdxl", entrants, net.reference, "UNet step, 2x4x64x64 latents, 77 prompt tokens; to fit in memory, "
                   "weights are rounded to bf16 once the fp32 reference is made, and every arm is made of those")


def sd3(run: Run) -> Iterator[Found]:
    net = joint_arms.sd3(joint_arms.SD3_MEDIUM, 64, 77 + 256)
    entrants = {"OpenVINO bf16": arms.openvino(net, "bf16", run.cache, run.threads)}
    entrants |= {"diffusers fp32": arms.eager(net, torch.float32), "diffusers bf16": arms.eager(net, torch.bfloat16)}
    entrants |= {f"ldmfast {p}": joint_arms.ours(net, p) for p in ("exact", "bf16", "int8")}
    yield run.race("sd3", entrants, net.reference, "four blocks of SD3-medium's width, 2x16x64x64 latents, 333 prompt "
                   "tokens")


def flux(run: Run) -> Iterator[Found]:
    net = joint_arms.flux(joint_arms.FLUX_DEV, 32, 512)
    entrants = {"OpenVINO bf16": arms.openvino(net, "bf16", run.cache, run.threads)}
    entrants |= {"diffusers bf16": arms.eager(net, torch.bfloat16)}
    entrants |= {f"ldmfast {p}": joint_arms.ours(net, p) for p in ("bf16", "int8")}
    yield run.race("flux", entrants, net.reference, "two double and four single blocks of FLUX.1's width, 1024 image "
                   "and 512 prompt tokens; weights are rounded to bf16 once the fp32 reference is made, and every arm "
                   "is made of those")


def dit(run: Run) -> Iterator[Found]:
    net = arms.dit(arms.DIT_XL_2, 32, low_only=True)
    yield transformer_case(run, "dit", net, "DiT-XL/2 forward, 2x4x32x32 latents; to fit in memory, weights are "
                           "rounded to bf16 once the fp32 reference is made, and every arm is made of those")


def pixart(run: Run) -> Iterator[Found]:
    yield transformer_case(run, "pixart", arms.pixart(arms.PIXART_4, 64), "PixArt alpha, full width, 4 of 28 blocks, "
                           "2x4x64x64 latents, prompts of 60 and 1 tokens in 120 places")


def transformer_case(run: Run, case: str, net: arms.Network, note: str) -> Found:
    """Every arm on one diffusion transformer; fp32 ones only where its weights are still there. What needs most memory
    to start comes first."""
    entrants = {"OpenVINO bf16": arms.openvino(net, "bf16", run.cache, run.threads)}
    entrants |= {"torch.compile bf16": arms.compiled(net), "diffusers bf16": arms.eager(net, torch.bfloat16)}
    entrants |= {f"ldmfast {p}": arms.ours(net, p) for p in ("bf16", "int8")}
    if net.module.dtype == torch.float32:
        entrants |= {"diffusers fp32": arms.eager(net, torch.float32), "ldmfast exact": arms.ours(net, "exact")}
    return run.race(case, entrants, net.reference, note)


def vae(run: Run) -> Iterator[Found]:
    yield vae_case(run, "vae", arms.SD_VAE, 64)


def vae_case(run: Run, case: str, config: dict[str, Any], size: int) -> Found:
    net = arms.vae(config, size)
    entrants = {"OpenVINO bf16": arms.openvino(net, "bf16", run.cache, run.threads)}
    entrants |= {"diffusers fp32": arms.eager(net, torch.float32), "diffusers bf16": arms.eager(net, torch.bfloat16)}
    entrants |= {f"ldmfast {p}": arms.ours(net, p) for p in ("exact", "bf16")}
    return run.race(case, entrants, net.reference, f"decoder, 1x{config['latent_channels']}x{size}x{size} latents")


def tiny(run: Run) -> Iterator[Found]:
    call = {"prompt": PROMPT, "num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "np"}
    entrants, reference = pipeline_arms(TINY, call)
    yield run.race("tiny", entrants, reference, "whole call of the shipped model, text to pixels, 20 DDIM steps")


def load(run: Run) -> Iterator[Found]:
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    folder = checkpoint(run.cache / "sd15-fp32", arms.SD15_UNET, arms.SD_VAE, text)
    yield load_case(run, "load", folder)


def checkpoint(folder: Path, unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> Path:
    """A Stable Diffusion folder of random fp32 weights, made if it is not there."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        encoder = transformers.CLIPTextConfig(**text)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY.parent / "clip_tokenizer", local_files_only=True)
        schedule = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                           clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        pipe = diffusers.StableDiffusionPipeline(
            arms.random_model(diffusers.AutoencoderKL, vae), transformers.CLIPTextModel(encoder), tokenizer,
            arms.random_model(diffusers.UNet2DConditionModel, unet), schedule, None, None,
            requires_safety_checker=False)
        pipe.save_pretrained(Path(temporary) / "new")
        os.replace(Path(temporary) / "new", folder)
    return folder


def load_case(run: Run, case: str, folder: Path) -> Found:
    """Each arm in fresh processes, in turn; the files are in the page cache after the first."""
    def once(library: str, precision: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, str(Path(__file__).with_name("load.py")), str(folder), "--library",
                               library, "--precision", precision, "--threads", str(run.threads)],
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1])
        return json.loads(done.stdout.splitlines()[-1])

    reference = torch.tensor(once("diffusers", "exact")["latents"])
    versions = {"ldmfast": f"ldmfast {ldmfast.__version__}", "diffusers": package("diffusers")}
    rows = {name: {"version": versions[name.split()[0]], "settings": "fresh process, files in the page cache"}
            for name in ("diffusers bf16", "ldmfast bf16", "ldmfast int8") if run.wants(name)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for name in tqdm(list(in_turn(rows, run.repeats)), desc=case, unit="process", leave=False):
        if "unavailable" not in rows[name]:
            try:
                runs[name].append(once(*name.split()))
            except RuntimeError as error:
                rows[name]["unavailable"] = reason(error).removeprefix("RuntimeError: ")
    for name, row in rows.items():
        if "unavailable" not in row:
            add_times(row, [r["seconds"] for r in runs[name]])
            row["error"] = relative_rms(torch.tensor(runs[name][0]["latents"]), reference)
            row["kept_bytes"] = runs[name][0]["kept_bytes"]
            worst = max(runs[name], key=lambda r: r["peak_bytes"])
            row |= {"peak_bytes": worst["peak_bytes"], "peak_over_kept": worst["peak_over_kept"]}
    return case, {"note": "from an fp32 folder on disk to the first step done, after the imports", "arms": rows}


WORK: dict[str, Callable[[Run], Iterator[Found]]] = {f.__name__: f for f in (
    attention, group_norm_silu, sd15, sdxl, dit, pixart, sd3, flux, vae, tiny, load)}

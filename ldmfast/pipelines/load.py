"""Parts of a checkpoint to live components: denoiser, autoencoder, text encoders, schedule."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import Parts
from ..errors import CheckpointError, DeviceError, PrecisionError
from ..loras import Stack
from ..models import REGISTRY, TEXT_ENCODERS
from ..models.rowwise import check_device, plan_for
from ..quantization import Plan, store
from ..samplers import Schedule
from ..torch_modes import own_modes
from .t5_text import load_t5
from .text import TextEncoder

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PRECISIONS = {"exact": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Components:
    """Everything a pipeline runs; read-only after loading, so one set serves many threads."""

    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]  # TextEncoder, or one T5Encoder
    schedule: Schedule
    scheduler_config: dict[str, Any]
    index: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    loras: Stack | None = None  # unet and text_encoders are with its active adapters


def resolve_device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {device!r}: use 'cpu' or 'cuda'") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {device!r} was asked for and torch {torch.__version__} sees no GPU: "
                          "use device='cpu'")
    if chosen.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r} is not supported: use 'cpu' or 'cuda'")
    return chosen


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(
    precision: str | None, dtype: torch.dtype | None, device: torch.device
) -> tuple[str, torch.dtype]:
    """(name, dtype of the networks). "auto" is bf16 where the device multiplies bf16 natively, otherwise exact."""
    if precision is None:
        if dtype is None or dtype == torch.float32:
            return "exact", torch.float32
        if dtype == torch.bfloat16:
            return "bf16", torch.bfloat16
        if dtype == torch.float16 and device.type == "cuda":
            return "fp16", torch.float16
        if dtype == torch.float16:
            raise PrecisionError("dtype=torch.float16 has no fast arithmetic on a CPU: use precision='bf16' or 'exact'")
        raise PrecisionError(f"dtype={dtype} is not supported: use torch.float32 or torch.bfloat16")
    if precision == "auto":
        precision = "bf16" if _has_fast_bf16(device) else "exact"
    if precision not in PRECISIONS:
        raise PrecisionError(f"precision={precision!r} is not available in this version: use 'exact', 'bf16', "
                             "'int8', 'fp8' or 'auto'")
    if precision in ("int8", "fp8"):
        check_device(precision, device)
    if dtype is not None and dtype != PRECISIONS[precision]:
        raise PrecisionError(f"precision={precision!r} and dtype={dtype} contradict each other: give one of them")
    return precision, PRECISIONS[precision]


# defaults of diffusers' pipelines that are not those of Stable Diffusion
_NETWORK_DEFAULTS: dict[str, dict[str, Any]] = {
    "DiT": {"guidance_scale": 4.0}, "PixArt": {"guidance_scale": 4.5, "num_inference_steps": 20}}


def _model(parts: Parts, part: str, dtype: torch.dtype, device: torch.device, int8: Plan | None = None) -> Any:
    config = parts.config(part)
    kinds = TEXT_ENCODERS if part.startswith("text_encoder") else REGISTRY
    name = config.get("_class_name") or parts.class_name(part)
    if name not in kinds:
        raise CheckpointError(f"{parts.path}: part {part!r} is a {name}, which is not supported; "
                              f"supported: {', '.join(sorted(kinds))}")
    try:
        model = kinds[name][1].from_weights(
            config, parts.stream(part, None if int8 else dtype, device), pack=True, int8=int8, dtype=dtype)
    except CheckpointError as error:
        where = "" if str(parts.path) in str(error) else f"{parts.path}: part {part!r}: "
        raise CheckpointError(f"{where}{error}") from error
    return model.eval()


def _tokenizer(parts: Parts, part: str) -> Any:
    from transformers import CLIPTokenizer

    folder = parts.folder(part)
    try:
        if folder is not None:
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            tokenizer = CLIPTokenizer.from_pretrained(str(ASSETS / "clip_tokenizer"), local_files_only=True,
                                                      **parts.config(part))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{parts.path}: part {part!r} is not a readable CLIP tokenizer "
                              f"({str(error).splitlines()[0]})") from error
    if getattr(tokenizer, "_merges", None):
        tokenizer._merges = []  # 13 MiB that only its constructor reads
    return tokenizer


def int8_file(parts: Parts) -> Path:
    """Where the calibrated int8 network of a checkpoint is, if there is one."""
    folder = parts.folder(denoiser_part(parts))
    return folder / store.NAME if folder is not None else parts.path.with_name(f"{parts.path.stem}.{store.NAME}")


def fingerprint_of(parts: Parts) -> str:
    """The fingerprint of the denoiser's weights, or of the single file."""
    return fingerprint(parts.folder(denoiser_part(parts)) or parts.path)


def denoiser_part(parts: Parts) -> str:
    return "transformer" if "transformer" in parts.names else "unet"


def _int8_denoiser(parts: Parts, device: torch.device) -> Any:
    """From the calibrated file beside the weights, otherwise from the weights with the plan that needs no data; the
    file is for CPUs."""
    if device.type != "cpu":
        return _model(parts, denoiser_part(parts), torch.bfloat16, device, plan_for("int8", device))
    part, file = denoiser_part(parts), int8_file(parts)
    if file.exists():
        plan, made_from, header = store.read_plan(file)
        if made_from == fingerprint_of(parts):
            config = parts.config(part)
            cls = REGISTRY[config.get("_class_name") or parts.class_name(part)][1]
            return store.load(cls, config, header, plan).eval()
        warnings.warn(f"{file} was made from other weights than are there now; it is not used (write it again with "
                      "'ldmfast quantize')", stacklevel=2)
    return _model(parts, part, torch.bfloat16, device, Plan())


def fingerprint(path: Path) -> str:
    """Sixteen hex digits over names, sizes and both ends of the weight files: cheap, tells models apart."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.suffix in (".safetensors", ".bin")
                                           and f.name != store.NAME]
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as f:
            digest.update(f.read(1 << 16))
            f.seek(max(0, size - (1 << 16)))
            digest.update(f.read())
    return digest.hexdigest()[:16]


def read_defaults(folder: Path) -> dict[str, Any]:
    """The settings that a folder's ldmfast.json recommends; none without one. Raises CheckpointError."""
    file = folder / "ldmfast.json"
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    allowed = {"num_inference_steps", "guidance_scale", "solver"}
    if not isinstance(values, dict) or not values.keys() <= allowed:
        raise CheckpointError(f"{file}: may only set {', '.join(sorted(allowed))}")
    return values


def _few_steps(parts: Parts, schedule: Schedule) -> dict[str, Any]:
    """A consistency model is no denoiser: its scheduler's own solver, and diffusers' settings of LCM's pipelines."""
    found: dict[str, Any] = {"solver": schedule.solver} if schedule.solver in ("lcm", "tcd") else {}
    if str(parts.index.get("_class_name")).startswith("LatentConsistencyModel"):
        found |= {"num_inference_steps": 4, "guidance_scale": 8.5}
    return found


def _scheduler_config(parts: Parts) -> dict[str, Any]:
    """The folder's scheduler config with the two corrections that diffusers' Stable Diffusion pipelines make when they
    are built: latents are not clipped, and steps_offset is 1 (SD 1 and SD 2)."""
    if "scheduler" not in parts.names:
        return {}
    config = dict(parts.config("scheduler"))
    pipeline = str(parts.index.get("_class_name") or "")
    if pipeline.startswith("StableDiffusion"):
        config["clip_sample"] = False
        if "XL" not in pipeline:
            config["steps_offset"] = 1
    return config


@own_modes()
def load(parts: Parts, precision: str, dtype: torch.dtype, device: torch.device) -> Components:
    """Build every component that ``parts`` has. Raises CheckpointError with the file and part that is wrong."""
    names, part = set(parts.names), denoiser_part(parts)
    vae_part = "vae" if "vae" in names else "vqvae"
    for needed in (part, vae_part):
        if needed not in names:
            raise CheckpointError(f"{parts.path}: has no part {needed!r}; it has {', '.join(sorted(names)) or 'none'}")
    scheduler_config = _scheduler_config(parts)
    schedule = Schedule.from_config(scheduler_config)
    # of two CLIP encoders the states before the last layer are used
    two = "text_encoder_2" in names and parts.class_name("text_encoder_2") != "T5EncoderModel"
    encoders: list[Any] = []
    for suffix in ("", "_2", "_3"):
        if f"text_encoder{suffix}" not in names:
            continue
        if f"tokenizer{suffix}" not in names:
            raise CheckpointError(f"{parts.path}: has part 'text_encoder{suffix}' but no 'tokenizer{suffix}'")
        if part == "transformer" and parts.class_name(f"text_encoder{suffix}") == "T5EncoderModel":
            encoders.append(load_t5(parts, suffix, dtype, device, int8=precision == "int8"))
            continue
        encoders.append(TextEncoder(_tokenizer(parts, f"tokenizer{suffix}"),
                                    _model(parts, f"text_encoder{suffix}", dtype, device), two))
    unet = (_int8_denoiser(parts, device) if precision == "int8" else
            _model(parts, part, dtype, device, Plan(form="fp8") if precision == "fp8" else None))
    upcast = dtype == torch.float16 and parts.config(vae_part).get("force_upcast", False)
    vae = _model(parts, vae_part, torch.float32 if upcast else dtype, device)
    defaults = _NETWORK_DEFAULTS.get(type(unet).__name__, {}) | _few_steps(parts, schedule)
    defaults |= read_defaults(Path(parts.path))
    return Components(unet, vae, tuple(encoders), schedule, scheduler_config, parts.index, defaults,
                      fingerprint(parts.path))

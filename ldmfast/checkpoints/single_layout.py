"""The parts of a diffusers folder laid out as one CompVis / ComfyUI file: names, shapes, and what such a file loses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import to_ldm
from .parts import Parts
from .single_file import SingleFile
from .weight_file import Stored, WeightFile

_VOCABULARY = Path(__file__).resolve().parent.parent / "assets" / "clip_tokenizer" / "vocab.json"
_HELD = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler", "tokenizer", "tokenizer_2")
_NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_NOISE_DEFAULTS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
# what CLIPTextConfig has where config.json is silent
_TEXT = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
         "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_IN_PLAN = {"down_block_types", "up_block_types", "mid_block_type", "block_out_channels", "layers_per_block",
            "cross_attention_dim", "attention_head_dim", "transformer_layers_per_block", "sample_size",
            "norm_num_groups", "reverse_transformer_layers_per_block", "only_cross_attention", "use_linear_projection"}
# of an autoencoder: for the pipeline, not in the network; a file that holds nothing else need not tell them
_FREE = ("sample_size", "force_upcast")
_FREE_ALONE = (*_FREE, "scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class SingleLayout:
    """tensors: name in the file -> as stored in the folder, with the shape in the file. left_out: parts that have no
    place there."""

    parts: Parts
    kinds: dict[str, tuple[str, str]]  # part -> kind of rules, prefix
    tensors: dict[str, Stored]
    metadata: dict[str, str]
    left_out: list[str]

    def read(self) -> Iterator[tuple[str, Tensor, int]]:
        """(name in the file, tensor, which third of the rows it is)."""
        for part, (kind, prefix) in self.kinds.items():
            layout = to_ldm.Layout.of(self.parts.tensors(part))
            for name, tensor in self.parts.stream(part):
                placed = to_ldm.rename(kind, name, layout)
                tensor = placed.apply(tensor)
                yield prefix + placed.name, tensor, placed.third
                del tensor
        for marker in ("v_pred", "ztsnr"):
            if marker in self.tensors:
                yield marker, torch.empty(0), 0


def lay_out(parts: Parts) -> SingleLayout:
    """Raises CheckpointError, naming the part and the setting, when a single file cannot hold the model: it stores no
    configs, so whoever opens it must infer the very same network from names and shapes."""
    if "model" in parts.names:
        return _one_model(parts)
    if "unet" not in parts.names:
        raise CheckpointError(f"{parts.path}: has no UNet, so it is not a model that single files hold")
    kinds = _kinds(parts)
    tensors: dict[str, Stored] = {}
    for part, (kind, prefix) in kinds.items():
        tensors |= _placed(parts, part, kind, prefix)
    scheduler = parts.config("scheduler") if "scheduler" in parts.names else {}
    prediction = scheduler.get("prediction_type", "epsilon")
    metadata = {"modelspec.prediction_type": "v" if prediction == "v_prediction" else str(prediction)}
    for marker, on in (("v_pred", prediction == "v_prediction"), ("ztsnr", scheduler.get("rescale_betas_zero_snr"))):
        if on:
            tensors[marker] = Stored("float32", torch.float32, (0,), 0)
    found = SingleFile(_Planned(parts.path, tensors, metadata))
    for part in kinds:
        _check_part(parts, part, part, found)
    if scheduler:
        _check_noise(parts, scheduler, found.config("scheduler"))
    for part in ("tokenizer", "tokenizer_2"):
        _check_tokenizer(parts, part)
    return SingleLayout(parts, kinds, tensors, metadata, [n for n in parts.names if n not in _HELD])


def _one_model(parts: Parts) -> SingleLayout:
    kind = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}.get(parts.class_name("model"))
    if kind is None:
        raise CheckpointError(f"{parts.path}: a {parts.class_name('model')} has no layout for a single file; "
                              "convertible are UNet2DConditionModel and AutoencoderKL")
    tensors = _placed(parts, "model", kind, "")
    _check_part(parts, "model", kind, SingleFile(_Planned(parts.path, tensors, {})))
    return SingleLayout(parts, {"model": (kind, "")}, tensors, {}, [])


def _kinds(parts: Parts) -> dict[str, tuple[str, str]]:
    kinds = {"unet": ("unet", "model.diffusion_model."), "vae": ("vae", "first_stage_model.")}
    first, second = ("text_encoder" in parts.names), ("text_encoder_2" in parts.names)
    if first and second:
        kinds["text_encoder"] = "clip", "conditioner.embedders.0.transformer."
        kinds["text_encoder_2"] = "open_clip", "conditioner.embedders.1.model."
    elif second:
        kinds["text_encoder_2"] = "open_clip", "conditioner.embedders.0.model."
    elif first and parts.config("text_encoder").get("hidden_act", "quick_gelu") == "quick_gelu":
        kinds["text_encoder"] = "clip", "cond_stage_model.transformer."
    elif first:
        kinds["text_encoder"] = "open_clip", "cond_stage_model.model."
    return {part: kind for part, kind in kinds.items() if part in parts.names}


def _placed(parts: Parts, part: str, kind: str, prefix: str) -> dict[str, Stored]:
    stored = parts.tensors(part)
    layout = to_ldm.Layout.of(stored)
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        try:
            placed = to_ldm.rename(kind, name, layout)
        except CheckpointError as error:
            raise CheckpointError(f"{parts.path}: part {part!r}: {error}") from error
        found[prefix + placed.name] = replace(tensor, shape=placed.shape(tensor.shape))
    return found


class _Planned(WeightFile):
    """A file that is not written yet."""

    def __init__(self, path: Path, tensors: dict[str, Stored], metadata: dict[str, str]):
        self.path, self.tensors, self.metadata = path, tensors, metadata

    def read(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return iter(())


def _check_part(parts: Parts, part: str, place: str, found: SingleFile) -> None:
    given, read = parts.config(part), found.config(place)
    free = _FREE_ALONE if part == "model" else _FREE
    for key, (a, b) in _differences(parts.class_name(part), given, read).items():
        if key in free:
            continue
        raise CheckpointError(f"{parts.path}: part {part!r} has {key} = {a!r}, and a single file, which stores no "
                              f"configs, is read with {b!r}; keep it as a folder")


def _differences(name: str, given: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    from ..models import REGISTRY

    if name not in REGISTRY:
        keys = [*_TEXT, *(["projection_dim"] if name.endswith("WithProjection") else [])]
        both = [{**_TEXT, "projection_dim": 512, **c} for c in (given, found)]
        return {k: (both[0][k], both[1][k]) for k in keys if both[0][k] != both[1][k]}
    config = REGISTRY[name][0]
    a, b = config.from_dict(given), config.from_dict(found)
    flat = [_flat(x) for x in (a, b)]
    both_keys = sorted({*flat[0], *flat[1]})
    return {k: (flat[0].get(k), flat[1].get(k)) for k in both_keys if flat[0].get(k) != flat[1].get(k)}


def _flat(config: Any) -> dict[str, Any]:
    """What makes the network: settings, and for a UNet what its blocks become."""
    own = {f.name: getattr(config, f.name) for f in fields(config)}
    if not hasattr(config, "plan"):
        return own
    plan = config.plan()
    found = {k: v for k, v in own.items() if k not in _IN_PLAN}
    found |= {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in ("down", "mid", "up")}
    for side, blocks in (("down", plan.down), ("up", plan.up), ("mid", (plan.mid,) if plan.mid else ())):
        for i, block in enumerate(blocks):
            unused = {"head_dim"} if block.kind == "cross" else {"head_dim", "heads", "context_dim", "depths",
                                                                 "only_cross_attention"}
            found |= {f"{side} block {i}: {f.name}": getattr(block, f.name) for f in fields(block)
                      if f.name not in unused}
    return found


def _check_noise(parts: Parts, given: dict[str, Any], found: dict[str, Any]) -> None:
    for key in _NOISE:
        a, b = (c.get(key, _NOISE_DEFAULTS.get(key)) or None for c in (given, found))
        if a != b:
            raise CheckpointError(f"{parts.path}: the scheduler has {key} = {a!r}, and a single file is read with "
                                  f"{b!r}; keep it as a folder")


def _check_tokenizer(parts: Parts, part: str) -> None:
    folder = parts.folder(part) if part in parts.names else None
    if folder is None:
        return
    try:
        if (folder / "vocab.json").is_file():
            words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        else:
            words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: not a readable CLIP tokenizer ({error})") from error
    if words != json.loads(_VOCABULARY.read_text(encoding="utf-8")):
        raise CheckpointError(f"{folder}: has a vocabulary of its own, and a single file is read with CLIP's; keep "
                              "it as a folder")

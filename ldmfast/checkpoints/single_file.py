"""A whole pipeline in one file (CompVis / ComfyUI layout): parts and configs are inferred, no network is
used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import dit, flux, infer, ldm, sd3, to_ldm
from .parts import Parts, rename_old
from .weight_file import Stored, WeightFile

_UNET_MARK, _VAE_MARK = "input_blocks.0.0.weight", "decoder.conv_in.weight"
_CLIP_MARK, _OPEN_CLIP_MARK = "embeddings.token_embedding.weight", "token_embedding.weight"


@dataclass(frozen=True)
class _Part:
    kind: str
    prefix: str
    config: dict[str, Any]
    sources: dict[str, ldm.Renamed]  # name in the file -> names in the part


class SingleFile(Parts):
    """SD 1, SD 2, SDXL or its refiner in one file, or some of their parts, or a DiT, SiT, PixArt, SD 3 or FLUX:
    safetensors, GGUF, or a PyTorch file (through torch's weights-only loader). A UNet or VAE alone may have diffusers'
    names, too."""

    def __init__(self, file: WeightFile, prediction_type: str | None = None):
        self.path, self._file = file.path, file
        self._shapes = {k: t.shape for k, t in file.tensors.items()}
        try:
            self._parts = self._find_parts()
            self._configs = self._other_configs(prediction_type, file.metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        self.index = self._make_index()

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def sources(self, part: str) -> set[str]:
        """Names, as in the file, of the tensors that a part is made from."""
        return set(self._parts[part].sources) if part in self._parts else set()

    def config(self, part: str) -> dict[str, Any]:
        self.class_name(part)
        return dict(self._parts[part].config if part in self._parts else self._configs[part])

    def stream(self, part: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", *,
               mapped: bool = False) -> Iterator[tuple[str, Tensor]]:
        sources = self._sources_of(part)
        for name, tensor in self._file.read(list(sources), dtype, device, mapped=mapped):
            yield from sources[name].apply(tensor)
            del tensor  # before the next one is read

    def tensors(self, part: str) -> dict[str, Stored]:
        found = {}
        for name, renamed in self._sources_of(part).items():
            stored = self._file.tensors[name]
            for new, shape in zip(renamed.names, self._new_shapes(name, renamed)):
                size = stored.nbytes * prod(shape) // max(1, prod(stored.shape))
                found[new] = replace(stored, shape=shape, nbytes=size)
        return found

    def _sources_of(self, part: str) -> dict[str, ldm.Renamed]:
        self.class_name(part)
        if part not in self._parts:
            raise CheckpointError(f"{self.path}: part {part!r} has no weights")
        return self._parts[part].sources

    def _behind(self, prefix: str) -> dict[str, tuple[int, ...]]:
        return {k[len(prefix):]: v for k, v in self._shapes.items() if k.startswith(prefix)}

    def _sources(self, kind: str, prefix: str, numbers: ldm.Numbers) -> dict[str, ldm.Renamed]:
        renamed = {k: ldm.rename(kind, k[len(prefix):], numbers)
                   for k in self._shapes if k.startswith(prefix)}
        found = {k: r for k, r in renamed.items() if r is not None}
        for name, r in found.items():
            shape = self._shapes[name]
            fits = {"transpose": len(shape) == 2,
                    "linear": len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))}
            if r.change in (*ldm.SPLITS, "swap"):
                fits[r.change] = len(shape) > 0 and shape[0] % {"swap": 2, "split_single": 7}.get(
                    r.change, len(r.names)) == 0
            if not fits.get(r.change, True):
                raise CheckpointError(f"tensor {name!r} of a {kind} has shape {list(shape)}, which the original layout "
                                      "does not have there; the file is damaged, or of a kind that is not supported")
        return found

    def _find_parts(self) -> dict[str, _Part]:
        parts: dict[str, _Part] = {}
        for prefix, part in ldm.CLIP_PREFIXES:
            if any(prefix + more + _CLIP_MARK in self._shapes for more in ("", "text_model.")):
                parts[part] = self._text("clip", prefix)
        for prefix, part in ldm.OPEN_CLIP_PREFIXES:
            if prefix + _OPEN_CLIP_MARK in self._shapes:
                parts[part] = self._text("open_clip", prefix)
        parts |= self._diffusers_parts()
        unet = next((p for p in ldm.UNET_PREFIXES if p + _UNET_MARK in self._shapes), None)
        vae = next((p for p in ldm.VAE_PREFIXES if p + _VAE_MARK in self._shapes and "vae" not in parts), None)
        xl = False
        if unet is not None:
            second = parts.get("text_encoder_2")
            pooled = second.config["projection_dim"] if second else None
            config = infer.unet_config(self._behind(unet), pooled)
            xl = config.get("addition_embed_type") == "text_time"
            numbers = ldm.Numbers(layers_per_block=config["layers_per_block"], label=infer.label_part(config))
            parts["unet"] = _Part("unet", unet, config, self._sources("unet", unet, numbers))
        if vae is not None:
            config = infer.vae_config(self._behind(vae), xl)
            numbers = ldm.Numbers(vae_levels=len(config["block_out_channels"]))
            parts["vae"] = _Part("vae", vae, config, self._sources("vae", vae, numbers))
        transformer = next((p for p in dit.PREFIXES if p + dit.MARK in self._shapes), None)
        if transformer is not None:
            shapes = self._behind(transformer)
            kind, config = dit.kind_of(shapes), dit.config(shapes)
            numbers = ldm.Numbers(blocks=config["num_layers"])
            parts["transformer"] = _Part(kind, transformer, config, self._sources(kind, transformer, numbers))
        for kind, layout in (("flux", flux), ("sd3", sd3)):
            before = next((p for p in layout.PREFIXES if p + layout.MARK in self._shapes), None)
            if before is not None:
                config = layout.config(self._behind(before))
                numbers = ldm.Numbers(blocks=config["num_layers"])
                parts["transformer"] = _Part(kind, before, config, self._sources(kind, before, numbers))
                if kind == "sd3" and "vae" in parts:
                    parts["vae"].config.update(sd3.VAE)
        if not parts:
            some = ", ".join(map(repr, list(self._shapes)[:2])) or "none"
            raise CheckpointError("holds no part of SD 1, SD 2 or SDXL in the CompVis layout, and no DiT, PixArt, SD 3 "
                                  f"or FLUX in its original one (its tensors: {some}, ...);"
                                  " a whole diffusers model is opened by its folder")
        return parts

    def _diffusers_parts(self) -> dict[str, _Part]:
        """A UNet or VAE under diffusers' names, without a config: shapes are read as the CompVis layout has them."""
        parts: dict[str, _Part] = {}
        for part, mark in (("unet", "down_blocks.0.resnets.0.conv1.weight"),
                           ("vae", "decoder.up_blocks.0.resnets.0.conv1.weight")):
            prefixes = ldm.UNET_PREFIXES if part == "unet" else ldm.VAE_PREFIXES
            prefix = next((p for p in prefixes if p + mark in self._shapes), None)
            if prefix is None:
                continue
            new = {k: rename_old(k[len(prefix):]) for k in self._shapes if k.startswith(prefix)}
            current = {k: v for k, v in new.items() if v is not None}
            layout = to_ldm.Layout.of(current.values())
            shapes = {to_ldm.rename(part, v, layout).name: self._shapes[k] for k, v in current.items()}
            config = infer.unet_config(shapes) if part == "unet" else infer.vae_config(shapes)
            parts[part] = _Part(part, prefix, config, {k: ldm.Renamed((v,), "") for k, v in current.items()})
        return parts

    def _text(self, kind: str, prefix: str) -> _Part:
        sources = self._sources(kind, prefix, ldm.Numbers())
        projected = any("text_projection.weight" in r.names for r in sources.values())
        if kind == "open_clip" and prefix.startswith("cond_stage_model.") and projected:
            # SD 2 conditions on the last layer but one, its folder holds neither the last nor the projection;
            # a file
            # made from such a folder lacks both already
            last = max(infer._indices({n: () for r in sources.values() for n in r.names},
                                      r"text_model\.encoder\.layers\.(\d+)\."), default=-1)
            drop = (f"text_model.encoder.layers.{last}.", "text_projection.")
            sources = {k: r for k, r in sources.items() if not r.names[0].startswith(drop)}
            projected = False
        shapes = {n: s for k, r in sources.items() for n, s in zip(r.names, self._new_shapes(k, r))}
        config = infer.clip_config(shapes, projected and kind == "open_clip",
                                   "quick_gelu" if kind == "clip" else "gelu")
        if kind == "clip":
            sources = {k: r for k, r in sources.items() if not r.names[0].startswith("text_projection.")}
        return _Part(kind, prefix, config, sources)

    def _new_shapes(self, name: str, renamed: ldm.Renamed) -> list[tuple[int, ...]]:
        """For each new name."""
        shape = self._shapes[name]
        if renamed.change in ldm.SPLITS:
            return [(rows, *shape[1:]) for rows in ldm.split_rows(renamed.change, shape[0])]
        if renamed.change == "linear":
            shape = (shape[0], prod(shape[1:]))
        return [shape[::-1] if renamed.change == "transpose" else shape] * len(renamed.names)

    def _other_configs(self, prediction: str | None, metadata: dict[str, str]) -> dict[str, dict[str, Any]]:
        configs: dict[str, dict[str, Any]] = {}
        if "unet" in self._parts:
            unet = self._parts["unet"].config
            kind = infer.prediction_type(unet, metadata, self._shapes, prediction)
            if kind == "v_prediction" and unet["sample_size"] == 64:
                unet["sample_size"] = 96
            configs["scheduler"] = infer.scheduler_config("addition_embed_type" in unet, kind,
                                                          "ztsnr" in self._shapes)
        for part, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            if part in self._parts:
                open_clip = self._parts[part].kind == "open_clip"
                configs[tokenizer] = {
                    "model_max_length": self._parts[part].config["max_position_embeddings"],
                    "pad_token": "!" if open_clip else "<|endoftext|>"}  # "!" is id 0, open_clip's padding
        return configs

    def _make_index(self) -> dict[str, Any]:
        unet = self._parts["unet"].config if "unet" in self._parts else {}
        xl = "text_encoder_2" in self._parts or "addition_embed_type" in unet
        channels = unet.get("in_channels", 4)
        kind = {9: "Inpaint", 8: "InstructPix2Pix"}.get(channels, "")
        name = f"StableDiffusion{'XL' if xl else ''}{kind}Pipeline"
        index: dict[str, Any] = {"_class_name": name if "unet" in self._parts else None}
        for part, found in self._parts.items():
            cls = found.config.get("_class_name") or found.config["architectures"][0]
            index[part] = ["diffusers" if "_class_name" in found.config else "transformers", cls]
        for part, config in self._configs.items():
            library, cls = (("diffusers", config["_class_name"]) if part == "scheduler"
                            else ("transformers", "CLIPTokenizer"))
            index[part] = [library, cls]
        return index


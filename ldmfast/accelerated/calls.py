"""A call with diffusers' arguments, as the native network takes it: one function for each forward that is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..models.gemm import Conv2d

Arguments = dict[str, Any]


def unet_2d_condition(native: Any, given: Arguments) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    sample, timestep, packaged = given.pop("sample"), given.pop("timestep"), given.pop("return_dict", True)
    for name in ("down_block_additional_residuals", "down_intrablock_additional_residuals"):
        if given.get(name) is not None:
            given[name] = [residual.to(native.dtype) for residual in given[name]]
    out = _like(native(sample, timestep, **given), sample)
    return UNet2DConditionOutput(sample=out) if packaged else (out,)


def unet_2d(native: Any, given: Arguments) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DOutput

    sample, timestep, packaged = given.pop("sample"), given.pop("timestep"), given.pop("return_dict", True)
    out = _like(native(sample, timestep, **given), sample)
    return UNet2DOutput(sample=out) if packaged else (out,)


def sd3(native: Any, given: Arguments) -> Any:
    return _joint(native, given)


def flux(native: Any, given: Arguments) -> Any:
    if not isinstance(given.get("timestep"), Tensor):
        raise ShapeError("diffusers takes the timestep as a tensor only")
    return _joint(native, given)


def _joint(native: Any, given: Arguments) -> Any:
    sample, timestep, packaged = given.pop("hidden_states"), given.pop("timestep", None), given.pop("return_dict", True)
    if timestep is None:
        raise ShapeError("it needs a timestep")
    return _transformer_output(_like(native(sample, timestep, **given), sample), packaged)


def dit(native: Any, given: Arguments) -> Any:
    sample, timestep, packaged = given.pop("hidden_states"), given.pop("timestep", None), given.pop("return_dict", True)
    labels = given.get("class_labels")
    if timestep is None or labels is None or given.get("cross_attention_kwargs"):
        raise ShapeError("it needs timestep and class_labels, and takes no cross_attention_kwargs")
    if sample.shape[-1] != sample.shape[-2]:
        raise ShapeError("diffusers takes square pictures only")
    return _transformer_output(_like(native(sample, timestep, class_labels=labels), sample), packaged)


def pixart(native: Any, given: Arguments) -> Any:
    sample, timestep, packaged = given.pop("hidden_states"), given.pop("timestep", None), given.pop("return_dict", True)
    if timestep is None or given.pop("cross_attention_kwargs", None):
        raise ShapeError("it needs a timestep, and takes no cross_attention_kwargs")
    return _transformer_output(_like(native(sample, timestep, **given), sample), packaged)


def _transformer_output(out: Tensor, packaged: bool) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=out) if packaged else (out,)


def autoencoder_half(part: str) -> Callable[[Any, Arguments], Tensor]:
    """The encoder or decoder inside an autoencoder. What is around it (quant_conv, codebook, slicing, tiling with
    its blending, posterior) stays diffusers', which costs next to nothing and keeps every switch."""

    @torch.no_grad()
    def call(native: Any, given: Arguments) -> Tensor:
        network = native.get_submodule(part)
        first, *rest = given.values()
        _check_channels(part, first, network)
        return _like(network(first.to(native.dtype), *(t.to(native.dtype) for t in rest if t is not None)), first)

    return call


def _check_channels(part: str, x: Tensor, network: nn.Module) -> None:
    wanted = next(m.in_channels for m in network.modules() if isinstance(m, Conv2d))
    if x.ndim != 4 or x.shape[1] != wanted:
        raise ShapeError(f"the {part} got shape {tuple(x.shape)}, it needs (pictures, {wanted}, height, width)")


def _like(out: Tensor, sample: Tensor) -> Tensor:
    """In the dtype that diffusers returns, and in its memory order: ``randn_like`` and ``view`` depend on it."""
    plain = not sample.is_contiguous(memory_format=torch.channels_last) or sample.is_contiguous()
    return out.to(sample.dtype, memory_format=torch.contiguous_format if plain else torch.preserve_format)


# diffusers' class -> the modules whose forward is replaced ("" is the model itself)
CALLS: dict[str, dict[str, Callable[[Any, Arguments], Any]]] = {
    "UNet2DConditionModel": {"": unet_2d_condition},
    "UNet2DModel": {"": unet_2d},
    "SD3Transformer2DModel": {"": sd3},
    "FluxTransformer2DModel": {"": flux},
    "DiTTransformer2DModel": {"": dit},
    "PixArtTransformer2DModel": {"": pixart},
    **{name: {part: autoencoder_half(part) for part in ("encoder", "decoder")}
       for name in ("AutoencoderKL", "AutoencoderTiny", "VQModel")},
}

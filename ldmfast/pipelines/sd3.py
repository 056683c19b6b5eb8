"""Stable Diffusion 3 and 3.5: text to image with the arguments and defaults of diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from ..caches import Policy
from ..errors import LdmfastError
from ..guidance import Guidance, SkipLayer
from ..samplers import StepTable, TimeGrid, make_table
from .inputs import GeneratorLike, number
from .joint import JointPipeline, number_of_steps, scale_of
from .output import PipelineOutput
from .request import grid_of
from .text import PromptEmbeds, encode_prompts

if TYPE_CHECKING:
    from ..tuning import Settings


class StableDiffusion3Pipeline(JointPipeline):
    """Two CLIP encoders and, if it is there, T5; classifier-free and skip-layer guidance."""

    prompts = ("prompt", "prompt_2", "prompt_3")
    kept: ClassVar[tuple[str, ...]] = (*JointPipeline.kept, "clip_skip", "skip_guidance_layers",
                                       "skip_layer_guidance_scale", "skip_layer_guidance_start",
                                       "skip_layer_guidance_stop")

    @property
    def multiple(self) -> int:
        return self.vae_scale_factor * int(self.unet.config.patch_size)

    @property
    def default_size(self) -> int:
        return int(self.unet.config.sample_size) * self.vae_scale_factor

    def latents_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        f = self.vae_scale_factor
        return pictures, self.unet.config.in_channels, height // f, width // f

    def encode(self, texts: Sequence[list[str]], length: int, clip_skip: int | None) -> PromptEmbeds:
        parts = [encode_prompts((encoder,), column, clip_skip=clip_skip, one_by_one=self.one_by_one)
                 for encoder, column in zip(self.clip_encoders, texts)]
        short = torch.cat([p.states for p in parts], dim=-1)
        if self.t5_encoder is not None:
            long = self.t5_encoder.padded(texts[-1], length).to(short)
        else:  # as in diffusers, where T5 may be left out to save memory
            long = short.new_zeros(len(short), length, self.unet.config.joint_attention_dim)
        short = F.pad(short, (0, long.shape[2] - short.shape[2]))
        pooled = torch.cat([p.pooled for p in parts if p.pooled is not None], dim=-1)
        return PromptEmbeds(torch.cat([short, long], dim=1), pooled)

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: GeneratorLike = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 256,
        skip_guidance_layers: Sequence[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: float | None = None,
        solver: str | None = None,
        cache: Policy | Sequence[Policy] | None = None,
        guidance: Guidance | Sequence[Guidance] | None = None,
        settings: Settings | str | None = None,
        grid: TimeGrid | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> PipelineOutput | tuple[Any, None]:
        """Generate pictures; names, meanings and defaults are diffusers' (28 steps, guidance 7), but for ``generator``,
        ``solver`` (default: the checkpoint's), ``cache``, ``guidance``, ``settings``, ``grid`` and
        ``progress``, which are as in Pipeline.

        prompt_2, prompt_3: for the second CLIP encoder and T5, if other texts. latents: (N, C, h, w).
        skip_guidance_layers: blocks left out in a third prediction, from which the result is pushed away by
        skip_layer_guidance_scale between the fractions start and stop of the steps (guidance.SkipLayer).
        Raises LdmfastError and its subclasses with one line, before any heavy work.
        """
        a = {k: v for k, v in locals().items() if k not in ("self", "return_dict", "settings", "__class__")}
        if settings is not None:
            return self._with_settings(settings, a, return_dict)
        scale, learned = scale_of(self, a, 7.0), grid_of(self, a)
        a["grid"] = None if learned is None else learned.to_dict()
        if skip_guidance_layers is not None and not isinstance(skip_guidance_layers, Sequence):
            raise LdmfastError(f"skip_guidance_layers={skip_guidance_layers!r} is not a list of numbers of blocks")
        layers = () if skip_guidance_layers is None or scale <= 1 else tuple(skip_guidance_layers)
        if not all(isinstance(i, int) and 0 <= i < self.unet.config.num_layers for i in layers):
            raise LdmfastError(f"skip_guidance_layers={list(layers)} are not numbers of blocks, 0 to "
                               f"{self.unet.config.num_layers - 1}")

        def table(height: int, width: int) -> StepTable:
            patches = (height // self.multiple) * (width // self.multiple)
            if learned is not None:
                return learned.table(self.schedule, mu=mu, image_seq_len=patches)
            steps = None if sigmas is not None else number_of_steps(self, a)
            return make_table(self.schedule, solver or self.loaded.defaults.get("solver"), steps, sigmas=a["sigmas"],
                              mu=mu, image_seq_len=patches)

        result = copy.copy(self).run(self.resolve(a, scale, scale > 1, table, _skipping(layers, a)))
        return result if return_dict else (result.images, None)


def _skipping(layers: tuple[int, ...], a: dict[str, Any]) -> tuple[Guidance, ...]:
    if not layers:
        return ()
    scale, start, stop = (number(f"skip_layer_guidance_{k}", a[f"skip_layer_guidance_{k}"])
                          for k in ("scale", "start", "stop"))
    return (SkipLayer(layers=layers, scale=scale, start=min(start, stop), stop=min(stop, 1.0)),)

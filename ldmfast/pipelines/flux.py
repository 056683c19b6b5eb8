"""FLUX.1: text to image with the arguments and defaults of diffusers' FluxPipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import LdmfastError
from ..samplers import StepTable, make_table
from .inputs import GeneratorLike
from .joint import JointPipeline, JointRequest, number_of_steps, scale_of
from .output import PipelineOutput
from .request import number
from .text import PromptEmbeds, tokenize


class FluxPipeline(JointPipeline):
    """CLIP's pooled text and T5's states; guidance is an input of the network, or classifier-free (true_cfg_scale)."""

    prompts = ("prompt", "prompt_2")
    kept: ClassVar[tuple[str, ...]] = (*JointPipeline.kept, "true_cfg_scale")

    @property
    def default_size(self) -> int:
        return 128 * self.vae_scale_factor

    def latents_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        return pictures, (height // self.multiple) * (width // self.multiple), self.unet.config.in_channels

    def pack(self, noise: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, h / 2 * w / 2, 4 C): a token for each 2x2 patch, as diffusers keeps FLUX' latents."""
        n, c, h, w = noise.shape
        return noise.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * (w // 2), 4 * c)

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        n, _, c = latents.shape
        h, w = height // self.multiple, width // self.multiple
        return latents.view(n, h, w, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, 2 * h, 2 * w)

    def network_time(self, t: float) -> float:
        return t / 1000

    def conditions(self, request: JointRequest, rows: int, tokens: int) -> dict[str, Any]:
        h, w = request.height // self.multiple, request.width // self.multiple
        ids = torch.zeros(h, w, 3)
        ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
        found: dict[str, Any] = {"img_ids": ids.view(h * w, 3), "txt_ids": torch.zeros(tokens, 3)}
        if self.unet.config.guidance_embeds:
            found["guidance"] = torch.full((rows,), request.arguments["guidance_scale"], device=self.device)
        return found

    def encode(self, texts: Sequence[list[str]], length: int, clip_skip: int | None) -> PromptEmbeds:
        clip, t5 = self.clip_encoders[0], self.t5_encoder
        if t5 is None:
            raise LdmfastError("this checkpoint has no T5 encoder: give prompt_embeds and pooled_prompt_embeds")
        pooled = [clip.model(tokenize(clip, [text]).to(clip.model.device)).pooler_output for text in texts[0]]
        return PromptEmbeds(t5.padded(texts[1], length), torch.cat(pooled))

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: GeneratorLike = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        *,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        solver: str | None = None,
        progress: bool = True,
    ) -> PipelineOutput | tuple[Any, None]:
        """Generate pictures; names, meanings and defaults are diffusers' (28 steps, guidance 3.5), but for
        ``generator``, ``solver`` (default: the checkpoint's) and ``progress``, which are as in Pipeline.

        guidance_scale: what a guidance-distilled network (dev) is told; nothing to others. true_cfg_scale above 1 with
        a negative prompt: classifier-free guidance, twice the work. prompt_2: for T5, if another text. latents, and
        output_type "latent": (N, tokens, 4 C), as diffusers has them.
        Raises LdmfastError and its subclasses with one line, before any heavy work.
        """
        a = {k: v for k, v in locals().items() if k not in ("self", "return_dict", "__class__")}
        if self.unet.config.in_channels != 4 * self.vae.config.latent_channels:
            raise LdmfastError(f"the network takes {self.unet.config.in_channels} channels a token, the latents have "
                               f"{4 * self.vae.config.latent_channels}: this kind of conditioning is not supported")
        a["guidance_scale"] = scale_of(self, a, 3.5)
        scale = number("true_cfg_scale", true_cfg_scale)
        guided = scale > 1 and (negative_prompt is not None or negative_prompt_embeds is not None)

        def table(height: int, width: int) -> StepTable:
            tokens = (height // self.multiple) * (width // self.multiple)
            if sigmas is None:
                steps = number_of_steps(self, a)
                given = np.linspace(1.0, 1 / steps, steps).tolist()
            else:
                given = a["sigmas"]
            return make_table(self.schedule, solver or self.loaded.defaults.get("solver"), sigmas=given,
                              image_seq_len=tokens)

        result = self.run(self.resolve(a, scale if guided else 1.0, guided, table))
        return result if return_dict else (result.images, None)

"""FLUX.1: text to image with the arguments and defaults of diffusers' FluxPipeline; Depth and Canny, which are shown a
picture to follow (FluxControlPipeline), and Fill, a picture and what of it to draw anew (FluxFillPipeline).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ..caches import Policy
from ..errors import LdmfastError
from ..guidance import Guidance
from ..samplers import StepTable, TimeGrid, make_table
from ..torch_modes import own_modes
from .inputs import GeneratorLike, number, prepare_image, prepare_mask, repeat_to
from .joint import JointPipeline, JointRequest, number_of_steps, scale_of
from .output import PipelineOutput
from .request import grid_of
from .run import encode
from .text import PromptEmbeds, tokenize

if TYPE_CHECKING:
    from ..tuning import Settings


class FluxPipeline(JointPipeline):
    """CLIP's pooled text and T5's states; guidance is an input of the network, or classifier-free (true_cfg_scale)."""

    prompts = ("prompt", "prompt_2")
    kept: ClassVar[tuple[str, ...]] = (*JointPipeline.kept, "true_cfg_scale")

    @property
    def default_size(self) -> int:
        return 128 * self.vae_scale_factor

    def latents_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        return pictures, (height // self.multiple) * (width // self.multiple), 4 * self.vae.config.latent_channels

    @property
    def takes(self) -> tuple[str, ...]:
        """Pictures that the network sees beside the latents. Raises LdmfastError for channels of another meaning."""
        latents, mask = 4 * self.vae.config.latent_channels, 4 * self.vae_scale_factor**2
        beside, both = self.unet.config.in_channels - latents, latents + mask
        known: dict[int, tuple[str, ...]] = {0: (), latents: ("control_image",), both: ("image", "mask_image")}
        if beside not in known:
            raise LdmfastError(f"the network takes {beside} channels a token beside the {latents} of the latents: "
                               f"neither those of a picture ({latents}) nor of a picture and a mask ({both})")
        return known[beside]

    def start(self, request: JointRequest) -> tuple[Tensor, Tensor | None]:
        """Random numbers are drawn in diffusers' order: for Fill the whole picture's posterior, which strength 1 leaves
        nothing of, the noise, the masked picture's; for Depth and Canny their picture's posterior first."""
        pixels: dict[str, Tensor] = request.pixels
        if not pixels:
            return self.noise(request), None

        def packed(picture: Tensor) -> Tensor:
            return self.pack(encode(self, picture, cast(Any, request)))

        if "control_image" in pixels:
            beside = packed(pixels["control_image"])
            return self.noise(request), beside
        image, mask, f = pixels["image"], pixels["mask_image"], self.vae_scale_factor
        if request.latents is None:
            packed(image)
        x = self.noise(request)
        n, _, h, w = mask.shape
        cells = mask.view(n, h // f, f, w // f, f).permute(0, 2, 4, 1, 3).reshape(n, f * f, h // f, w // f)
        return x, torch.cat([packed(image * (1 - mask)), self.pack(cells).to(self.device)], dim=-1)

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
        ids = torch.zeros(h, w, 3, dtype=torch.float32)
        ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
        found: dict[str, Any] = {"img_ids": ids.view(h * w, 3), "txt_ids": torch.zeros(tokens, 3, dtype=torch.float32)}
        if self.unet.config.guidance_embeds:
            found["guidance"] = torch.full((rows,), request.arguments["guidance_scale"], dtype=torch.float32,
                                           device=self.device)
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
        image: Any = None,
        mask_image: Any = None,
        control_image: Any = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        solver: str | None = None,
        cache: Policy | Sequence[Policy] | None = None,
        guidance: Guidance | Sequence[Guidance] | None = None,
        settings: Settings | str | None = None,
        grid: TimeGrid | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> PipelineOutput | tuple[Any, None]:
        """Generate pictures; names, meanings and defaults are diffusers' (28 steps, guidance 3.5), but for
        ``generator``, ``solver`` (default: the checkpoint's), ``cache``, ``guidance`` (of the scale
        true_cfg_scale), ``settings``, ``grid`` and ``progress``, which are as in Pipeline.

        guidance_scale: what a guidance-distilled network (dev) is told; nothing to others. true_cfg_scale above 1 with
        a negative prompt: classifier-free guidance, twice the work. prompt_2: for T5, if another text. latents, and
        output_type "latent": (N, tokens, 4 C), as diffusers has them. image, mask_image (1: draw anew): for Fill, with
        50 steps and guidance 30 if not given. control_image: for Depth and Canny.
        Raises LdmfastError and its subclasses with one line, before any heavy work.
        """
        a = {k: v for k, v in locals().items() if k not in ("self", "return_dict", "settings", "__class__")}
        if settings is not None:
            return self._with_settings(settings, a, return_dict)
        pictures = {name: a.pop(name) for name in ("image", "mask_image", "control_image")}
        self._check_pictures(pictures)
        learned = grid_of(self, a)
        a["grid"] = None if learned is None else learned.to_dict()
        fill = "mask_image" in self.takes
        a["guidance_scale"] = scale_of(self, a, 30.0 if fill else 3.5)
        if fill and (num_inference_steps, learned) == (None, None) and not self.loaded.defaults.get(
                "num_inference_steps"):
            a["num_inference_steps"] = 50
        scale = number("true_cfg_scale", true_cfg_scale)
        guided = scale > 1 and (negative_prompt is not None or negative_prompt_embeds is not None)

        def table(height: int, width: int) -> StepTable:
            tokens = (height // self.multiple) * (width // self.multiple)
            if learned is not None:
                return learned.table(self.schedule, image_seq_len=tokens)
            if sigmas is None:
                steps = number_of_steps(self, a)
                given = np.linspace(1.0, 1 / steps, steps).tolist()
            else:
                given = a["sigmas"]
            return make_table(self.schedule, solver or self.loaded.defaults.get("solver"), sigmas=given,
                              image_seq_len=tokens)

        request = self.resolve(a, scale if guided or guidance is not None else 1.0, guided, table)
        result = copy.copy(self).run(replace(request, pixels=self._pixels(pictures, request)))
        return result if return_dict else (result.images, None)

    def _check_pictures(self, given: dict[str, Any]) -> None:
        for name, picture in given.items():
            if (picture is not None) != (name in self.takes):
                raise LdmfastError(f"{name} is needed by this network; it takes {' and '.join(self.takes)}"
                                   if picture is None else f"{name} was given to a network that takes "
                                   f"{' and '.join(self.takes) or 'no pictures'}; leave it out")

    def _pixels(self, given: dict[str, Any], request: JointRequest) -> dict[str, Tensor]:
        found = {}
        with own_modes(torch.inference_mode):
            for name in self.takes:
                prepare = prepare_mask if name == "mask_image" else prepare_image
                found[name] = repeat_to(prepare(given[name], request.height, request.width), request.pictures,
                                        "masks" if name == "mask_image" else "pictures")
        return found

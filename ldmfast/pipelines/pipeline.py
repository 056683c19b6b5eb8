"""The drop-in pipeline: text to image, image to image and inpainting with any latent-diffusion UNet."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import checkpoints
from ..caches import Policy
from ..errors import CheckpointError, LdmfastError
from ..guidance import Guidance
from ..models import REGISTRY, DiT, FluxTransformer2D, PixArt, SD3Transformer2D
from ..samplers import TimeGrid
from ..torch_modes import own_modes
from .inputs import GeneratorLike
from .load import ASSETS, Components, load, read_defaults, resolve_device, resolve_precision
from .lora import LoraMethods
from .output import PipelineOutput
from .request import Request
from .run import run

if TYPE_CHECKING:
    from ..engine import Engine
    from ..tuning import Judge, Report, Settings

# shipped networks and what the command line calls them
TINY = {"unet": "tiny", "dit": "tiny-dit", "lcm": "tiny-lcm"}


def _engine(device: torch.device) -> Engine | None:
    if device.type != "cuda":
        return None
    from ..engine import CudaGraphs, Engine

    return Engine(CudaGraphs(device))


class Pipeline(LoraMethods):
    """A loaded model. Calls share its read-only weights and keep their state to themselves: any number of threads
    may call one pipeline, and each gets what it would get alone.

    On a GPU ``engine`` (:mod:`ldmfast.engine`) runs steps and decodes as CUDA graphs; set it to None to run eagerly.

    Build one with :meth:`from_pretrained`, :meth:`from_single_file` or :meth:`tiny`.
    """

    takes_pictures: ClassVar[bool] = True  # as starting points

    def __init__(self, components: Components, *, precision: str, device: torch.device, source: str) -> None:
        self.loaded = components
        self.precision = precision
        self.one_by_one = precision == "exact"  # pictures have forwards of their own
        self.device = device
        self.source = source
        self.vae_tiling = False
        self._changing = threading.Lock()  # of ``loaded``, which is replaced as a whole
        self.engine: Engine | None = _engine(device)
        self.reopen: Callable[[str], Pipeline] | None = None  # the same model in another precision
        self.siblings: dict[str, Pipeline] = {}  # so opened, for settings that ask for them
        self.tuned: dict[str, Any] = {}  # by the last tune: "settings", "front" and "file"

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        precision: str | None = None,
        variant: str | None = None,
    ) -> Pipeline:
        """Load a diffusers folder. Nothing is ever downloaded.

        dtype / precision: "exact" (fp32, the default), "bf16", "int8" (the denoiser's products in 8 bits, on a
        CPU by the plan of ``ldmfast quantize`` if it is there, on a GPU its linears alone), "fp8" (its linears in e4m3,
        for GPUs of compute capability 8.9 or newer), or "auto" (bf16 where the device is fast in it).
        variant: weight files named ``model.<variant>.safetensors``, for instance "fp16".
        Raises CheckpointError, DeviceError, PrecisionError before weights are read where that can be told.
        """
        where = resolve_device(device)
        name, kind = resolve_precision(precision, dtype, where)
        parts = checkpoints.open_folder(Path(path), variant=variant)
        pipe = family(parts, cls)(load(parts, name, kind, where), precision=name, device=where, source=str(path))
        pipe.reopen = lambda p: cls.from_pretrained(path, device=device, precision=p, variant=variant)
        return pipe

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        precision: str | None = None,
        prediction_type: str | None = None,
    ) -> Pipeline:
        """Load a CompVis / ComfyUI layout safetensors file of SD 1, SD 2 or SDXL; its configs are inferred from its
        keys and shapes. prediction_type ("epsilon" or "v_prediction") overrides what the file implies: SD 2's two
        kinds hold the same keys. Raises as :meth:`from_pretrained`."""
        where = resolve_device(device)
        name, kind = resolve_precision(precision, dtype, where)
        parts = checkpoints.open_single_file(Path(path), prediction_type=prediction_type)
        if "transformer" in parts.names:
            network = REGISTRY[parts.class_name("transformer")][1].__name__
            raise CheckpointError(f"{path}: holds a {network} without the text side of a pipeline; open the model's "
                                  f"diffusers folder, or the network alone with models.{network}.from_single_file")
        pipe = family(parts, cls)(load(parts, name, kind, where), precision=name, device=where, source=str(path))
        pipe.reopen = lambda p: cls.from_single_file(path, device=device, precision=p, prediction_type=prediction_type)
        return pipe

    @classmethod
    def tiny(
        cls,
        network: str = "unet",
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        precision: str | None = None,
    ) -> Pipeline:
        """The model that ships with ldmfast: 64x64 pictures of coloured shapes (recipes/tiny).

        network: "unet", "dit" for the diffusion transformer that draws the same scenes (recipes/tiny_dit), or "lcm"
        for the UNet with its LCM-LoRA fused in: 4 steps of one forward each by default (recipes/tiny_lcm).
        Raises LdmfastError for another.
        """
        if network not in TINY:
            raise LdmfastError(f"network={network!r} does not ship with ldmfast: use one of {', '.join(TINY)}")
        folder = ASSETS / TINY[network].replace("-", "_")
        pipe = cls.from_pretrained(ASSETS / "tiny" if network == "lcm" else folder, dtype=dtype, device=device,
                                   precision=precision)
        if network == "lcm":
            pipe.load_lora_weights(folder, "lcm")
            pipe.fuse_lora()
            pipe.loaded = replace(pipe.loaded, defaults=read_defaults(folder))
        pipe.source = TINY[network]
        return pipe

    @property
    def unet(self) -> Any:
        return self.loaded.unet

    @property
    def vae(self) -> Any:
        return self.loaded.vae

    @property
    def schedule(self) -> Any:
        return self.loaded.schedule

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, as in diffusers."""
        transformers = (DiT, PixArt, SD3Transformer2D, FluxTransformer2D)
        name = "transformer" if isinstance(self.unet, transformers) else "unet"
        parts: dict[str, Any] = {name: self.unet, "vae": self.vae, "scheduler": self.schedule}
        for suffix, encoder in zip(("", "_2", "_3"), self.loaded.text_encoders):
            parts[f"text_encoder{suffix}"] = encoder.model
            parts[f"tokenizer{suffix}"] = encoder.tokenizer
        return parts

    def enable_vae_tiling(self) -> None:
        """Decode and encode pictures in overlapping tiles: bounded memory for large sizes. Set before use."""
        self.vae_tiling = True

    def disable_vae_tiling(self) -> None:
        self.vae_tiling = False

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent stands for along one side."""
        config = self.vae.config
        if hasattr(config, "block_out_channels") and not hasattr(config, "encoder_block_out_channels"):
            return 2 ** (len(config.block_out_channels) - 1)
        return 2 ** (len(config.encoder_block_out_channels) - 1)

    @own_modes(torch.inference_mode)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: GeneratorLike = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        *,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        solver: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        prompt_weighting: bool = False,
        class_labels: Any = None,
        max_sequence_length: int | None = None,
        use_resolution_binning: bool = True,
        loras: Any = None,
        cache: Policy | Sequence[Policy] | None = None,
        guidance: Guidance | Sequence[Guidance] | None = None,
        settings: Settings | str | None = None,
        grid: TimeGrid | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool = True,
    ) -> PipelineOutput | tuple[Any, None]:
        """Generate pictures. Names and meanings are those of diffusers.

        prompt: a text or a list of texts. Without ``image``: text to image. With ``image``: image to image. With
            ``image`` and ``mask_image`` (1 = repaint): inpainting; outside the mask the latents end exactly equal
            to the encoded picture's (4-channel networks).
        height, width: pixels, multiples of 8 (default: the network's training size, or the given image's size).
        num_inference_steps, guidance_scale, solver: default to what the checkpoint recommends (``ldmfast.json``),
            otherwise 50, 7.5 (DiT 4, PixArt 4.5 and 20 steps) and "dpmpp_2m" ("flow_euler" for a flow schedule).
            ``timesteps`` or ``sigmas`` give the steps explicitly.
        generator: an int (picture i uses seed + i), a torch.Generator (as diffusers: one stream for the batch), or
            a list with one int or Generator a picture. None draws a seed from torch's global generator.
        latents: (N, C, h, w) starting noise of unit variance instead of drawing it.
        strength: 0 to 1, how much of the picture is redrawn (default 0.8; 1.0 when inpainting).
        class_labels: for class-conditional networks; DiT makes a picture for each. prompt_attention_mask: beside
            PixArt's prompt_embeds, (prompts, tokens), 1 for the prompt's tokens. max_sequence_length: of a T5 prompt.
            use_resolution_binning: PixArt runs at the training size that is nearest in aspect ratio.
        output_type: "pil", "np" (N, H, W, 3), "pt" (N, 3, H, W), both in [0, 1], or "latent" (the VAE's units
            times its scaling factor).
        loras: adapters of this call in place of the active ones: a name, or {name: weight} ({} for none), or a list of
            these with one for each picture.
        cache: a policy of :mod:`ldmfast.caches`, or several, by which parts of the network's evaluations are reused or
            forecast from earlier ones: faster, another picture. ``report`` of the result says what was left out.
        guidance: a guidance of :mod:`ldmfast.guidance`, or several. guidance_scale is classifier-free guidance, and the
            scale of what is given in its place; it stays beside the others.
        settings: a :class:`ldmfast.tuning.Settings`, or "auto" for those that :meth:`tune` found for this model, in
            place of the arguments that they set; ``report`` says what they promise.
        grid: learned steps (:meth:`learn_grid`), as a TimeGrid or the JSON file of one, in place of
            ``num_inference_steps``, ``solver`` and the lists.
        prompt_weighting: reads "(word:1.3)", "((word))", "[word]" and BREAK in prompts, and encodes prompts of any
            length in chunks of the text encoder's size, as ComfyUI does (``ldmfast.pipelines.prompt_weights``).
        callback_on_step_end(call, step, timestep, {"latents": x}): may return {"latents": replacement};
            ``call.cancel()`` (or diffusers' ``call._interrupt = True``) ends this call after the step.
        Raises LdmfastError and its subclasses with one line, before any heavy work; PrecisionError when numbers
        become NaN or infinite on the way.
        """
        arguments = {k: v for k, v in locals().items() if k not in ("self", "return_dict", "settings", "__class__")}
        if settings is not None:
            return self._with_settings(settings, arguments, return_dict)
        pipe = copy.copy(self)  # other threads may swap adapters: this call keeps what is there now
        result = run(pipe, Request.resolve(pipe, **arguments))
        return result if return_dict else (result.images, None)

    def _with_settings(self, settings: Any, arguments: dict[str, Any], return_dict: bool
                       ) -> PipelineOutput | tuple[Any, None]:
        from ..tuning.settings import draw

        out = draw(self, settings, arguments)
        return out if return_dict else (out.images, None)

    def certify(self, prompts: Sequence[str], settings: Settings | str = "auto", *,
                seeds: Sequence[int] | int = 0, reference: Settings | None = None, judge: Judge | None = None,
                batch: int = 1, progress: bool = True, **call: Any) -> Report:
        """What ``settings`` change and save, measured on these prompts: :func:`ldmfast.tuning.certify`."""
        from ..tuning import certify

        return certify(self, prompts, settings, seeds=seeds, reference=reference, judge=judge, batch=batch,
                       progress=progress, **call)

    def tune(self, prompts: Sequence[str], *, min_psnr: float | None = None, max_latent_error: float | None = None,
             budget_s: float = 300.0, seed: int = 0, path: str | os.PathLike[str] | None = None,
             reference: Settings | None = None, batch: int = 1, progress: bool = True, **call: Any) -> Settings:
        """The fastest settings that keep a promise, found on these prompts: :func:`ldmfast.tuning.tune`."""
        from ..tuning import tune

        return tune(self, prompts, min_psnr=min_psnr, max_latent_error=max_latent_error, budget_s=budget_s, seed=seed,
                    path=path, reference=reference, batch=batch, progress=progress, **call)

    def repeat(self, settings: dict[str, Any], *, image: Any = None, mask_image: Any = None,
               progress: bool = True) -> PipelineOutput:
        """Make the picture again whose ``settings`` a PNG carries (:func:`ldmfast.pipelines.read_settings`).

        Raises LdmfastError when the settings belong to another model, precision or source picture.
        """
        from .repeat import repeat

        return repeat(self, settings, image=image, mask_image=mask_image, progress=progress)

    def learn_grid(self, prompts: str | Sequence[str] | None = None, steps: int = 6, solver: str | None = None,
                   **options: Any) -> TimeGrid:
        """Few steps placed where they bring this model's pictures nearest to a fine solve, for ``grid`` of a call.

        prompts: to learn from (default: some of its own). options: of :func:`ldmfast.pipelines.learn_grid.learn_grid`
        (pictures, seed, iterations, ...), and arguments of a call, such as guidance_scale and height.
        """
        from .learn_grid import learn_grid

        return learn_grid(self, prompts, steps, solver, **options)

    def __copy__(self) -> Pipeline:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        """One that shares the weights, which nobody writes; adapters, engine and settings are its own."""
        twin = copy.copy(self)
        twin._changing, twin.siblings, twin.tuned = threading.Lock(), {}, dict(self.tuned)
        twin.engine = None if self.engine is None else _engine(self.device)
        return twin

    def __reduce__(self) -> Any:
        """Raises LdmfastError: there are no pickles of pipelines."""
        raise LdmfastError("a pipeline cannot be pickled, since its weights lie as this processor's kernels read them: "
                           "open it in every process with Pipeline.from_pretrained (forked ones may use it as it is)")

    def __repr__(self) -> str:
        return f"ldmfast.Pipeline({self.source!r}, precision={self.precision!r}, device={str(self.device)!r})"


def family(parts: checkpoints.Parts, asked: type[Pipeline]) -> type[Pipeline]:
    """The class of pipelines whose arguments a checkpoint's calls have: ``asked``, or that of a family of its own.
    Raises CheckpointError for one of such a family that is not supported, or another than was asked for."""
    from .flux import FluxPipeline
    from .sd3 import StableDiffusion3Pipeline

    families: dict[str, type[Pipeline]] = {
        "FluxPipeline": FluxPipeline, "FluxControlPipeline": FluxPipeline, "FluxFillPipeline": FluxPipeline,
        "StableDiffusion3Pipeline": StableDiffusion3Pipeline}
    name = str(parts.index.get("_class_name"))
    found = families.get(name)
    if found is None and name.startswith(("Flux", "StableDiffusion3")):
        raise CheckpointError(f"{parts.path}: a {name} is not supported; of these families there are "
                              f"{', '.join(families)}")
    if asked in families.values() and found is not asked:
        raise CheckpointError(f"{parts.path}: is no {asked.__name__} but a {name}; open it with "
                              "ldmfast.Pipeline.from_pretrained")
    return found or asked

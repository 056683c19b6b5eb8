"""One network of random weights, and each way to run it: ldmfast, diffusers eager, torch.compile, OpenVINO."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from race import Arm, Call, package
from torch import Tensor, nn

import ldmfast

SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
DIT_XL_2 = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32,
            "out_channels": 8, "num_embeds_ada_norm": 1000}
PIXART_4 = {"num_layers": 4, "sample_size": 64, "caption_channels": 4096}  # full width, 4 of the 28 blocks
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
          "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
CALIBRATION_SAMPLES = 8


def random_model(cls: Any, config: dict[str, Any], seed: int = 0) -> Any:
    """Without torch's slow initialisers: normal weights of unit gain."""
    with torch.device("meta"):
        model = cls(**config)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    fill_positions(model)
    noise = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.normal_(std=p[0].numel() ** -0.5, generator=noise) if p.ndim > 1 else p.fill_(0.5)
    kept = model.state_dict()
    for name, table in model.named_buffers():
        if name in kept:  # SD 3's positions
            table.normal_(generator=noise)
    return model


def fill_positions(model: nn.Module) -> None:
    """The sines and cosines that a transformer of diffusers holds as a buffer, which is not in its state_dict."""
    part = getattr(model, "pos_embed", None)
    if part is not None and "pos_embed.pos_embed" not in model.state_dict() and hasattr(part, "pos_embed"):
        fresh = type(part)(height=model.config.sample_size, width=model.config.sample_size,
                           patch_size=model.config.patch_size, in_channels=1, embed_dim=part.pos_embed.shape[-1],
                           interpolation_scale=part.interpolation_scale)
        part.pos_embed.copy_(fresh.pos_embed)


def dit_step(dit: Any, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    return dit(sample, timestep=timestep, class_labels=labels, return_dict=False)[0]


def pixart_step(pixart: Any, sample: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    return pixart(sample, text, timestep, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=mask,
                  return_dict=False)[0]


def unet_step(unet: Any, sample: Tensor, timestep: Tensor, text: Tensor, *added: Tensor) -> Tensor:
    """added: SDXL's text_embeds and time_ids."""
    conditions = {"added_cond_kwargs": {"text_embeds": added[0], "time_ids": added[1]}} if added else {}
    return unet(sample, timestep, text, return_dict=False, **conditions)[0]


def decode(vae: Any, z: Tensor) -> Tensor:
    return vae.decode(z, return_dict=False)[0]


class Network:
    """A diffusers model and fp32 inputs that all arms share, and what diffusers fp32 makes of them (``reference``).

    low_only: after the reference was made the weights are rounded to bf16 in place, for networks of which a machine
    does not hold fp32 and the arms; ``module`` is then ``half``.
    """

    def __init__(self, cls: Any, config: dict[str, Any], inputs: tuple[Tensor, ...],
                 run: Callable[..., Tensor], seed: int = 0, low_only: bool = False) -> None:
        self.cls, self.config, self.inputs, self.run, self.seed = cls, config, inputs, run, seed
        self.module = random_model(cls, config, seed)
        self.parameters = sum(p.numel() for p in self.module.parameters())
        self.reference = run(self.module, *inputs)
        if low_only:
            self.module = self.half = self.module.to(torch.bfloat16).to(memory_format=torch.channels_last)

    @cached_property
    def half(self) -> Any:
        """bf16, channels-last."""
        with torch.device("meta"):
            model = self.cls(**self.config).to(torch.bfloat16)
        model = model.to_empty(device="cpu").eval().requires_grad_(False)
        fill_positions(model)
        model.load_state_dict(self.module.state_dict())
        return model.to(memory_format=torch.channels_last)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs)

    def key(self) -> str:
        """Names this network, its weights and input sizes."""
        text = json.dumps([self.cls.__name__, self.config, self.seed, [list(x.shape) for x in self.inputs],
                           torch.__version__, diffusers.__version__, CALIBRATION_SAMPLES], sort_keys=True)
        return f"{self.cls.__name__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def unet(config: dict[str, Any], size: int, low_only: bool = False) -> Network:
    """Two pictures (guidance) of size x size latents, 77 prompt tokens, timestep 500."""
    noise = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, config.get("in_channels", 4), size, size, generator=noise), torch.tensor(500),
              torch.randn(2, 77, config["cross_attention_dim"], generator=noise)]
    if "addition_time_embed_dim" in config:
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs += [torch.randn(2, width, generator=noise),
                   torch.tensor([[8.0 * size, 8.0 * size, 0, 0, 8.0 * size, 8.0 * size]] * 2)]
    return Network(diffusers.UNet2DConditionModel, config, tuple(inputs), unet_step, low_only=low_only)


def dit(config: dict[str, Any], size: int, low_only: bool = False) -> Network:
    """A class and "no class" (guidance), size x size latents, timestep 500."""
    noise = torch.Generator().manual_seed(1)
    inputs = (torch.randn(2, 4, size, size, generator=noise), torch.tensor([500, 500]), torch.tensor([207, 1000]))
    return Network(diffusers.DiTTransformer2DModel, config, inputs, dit_step, low_only=low_only)


def pixart(config: dict[str, Any], size: int) -> Network:
    """A prompt of 60 tokens and an empty one (guidance) of 120 places, size x size latents, timestep 500."""
    noise = torch.Generator().manual_seed(1)
    inputs = (torch.randn(2, 4, size, size, generator=noise), torch.tensor([500, 500]),
              torch.randn(2, 120, config["caption_channels"], generator=noise),
              (torch.arange(120) < torch.tensor([[60], [1]])).long())
    return Network(diffusers.PixArtTransformer2DModel, config, inputs, pixart_step)


def vae(config: dict[str, Any], size: int) -> Network:
    """The decoder on one picture of size x size latents."""
    z = torch.randn(1, config["latent_channels"], size, size, generator=torch.Generator().manual_seed(1))
    return Network(diffusers.AutoencoderKL, config, (z,), decode)


def ours(net: Network, precision: str) -> Arm:
    dtype = torch.float32 if precision == "exact" else torch.bfloat16

    def build() -> tuple[Call, dict[str, Any]]:
        model = ldmfast.models.from_diffusers(net.module, precision=precision)
        inputs = net.cast(dtype)
        if net.run is decode:
            return lambda: model.decode(inputs[0]), {}
        start, added = time.perf_counter(), dict(zip(("text_embeds", "time_ids"), inputs[3:]))
        if net.run is dit_step:
            state = model.prepare([500.0], class_labels=inputs[2])
        elif net.run is pixart_step:
            state = model.prepare([500.0], inputs[2], encoder_attention_mask=inputs[3])
        else:
            state = model.prepare([500.0], inputs[2], added_cond_kwargs=added or None)
        facts = {"prepare_s": time.perf_counter() - start}
        return lambda: model(inputs[0], 500.0, state=state), facts

    once = "" if net.run is decode else "; prompt keys and values and time embeddings once a call (prepare_s)"
    size = {"exact": 4, "bf16": 2, "int8": 2}[precision]  # int8: while it is made, the bf16 layer beside it
    return Arm(build, f"ldmfast {ldmfast.__version__}", f"precision={precision}{once}", net.parameters * size)


def eager(net: Network, dtype: torch.dtype) -> Arm:
    low = dtype != torch.float32
    module, inputs = net.half if low else net.module, net.cast(dtype)
    settings = "bf16 weights and inputs, channels_last" if low else "fp32"
    return Arm(lambda: (lambda: net.run(module, *inputs), {}), package("diffusers"), f"eager, {settings}")


def compiled(net: Network) -> Arm:
    def build() -> tuple[Call, dict[str, Any]]:
        import torch._inductor.config as inductor

        # a cache of its own, so that the compile time is a cold one
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        module = torch.compile(net.half)
        inputs = net.cast(torch.bfloat16)
        # not torch.compile(options=...): freezing is read before options take effect, and would be left out silently
        with inductor.patch(freezing=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo's remarks on diffusers' code
            net.run(module, *inputs)
        return lambda: net.run(module, *inputs), {}

    folder = tempfile.TemporaryDirectory(prefix="inductor")
    return Arm(build, package("torch"), "torch.compile, inductor, freezing, bf16, channels_last, cold cache",
               net.parameters * 2)


# --- OpenVINO ---


class _Positional(nn.Module):
    """What the converter wants: tensors in, one tensor out."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.module, self.run = net.module, net.run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self.module, *inputs)


def _kept(cache: Path, name: str, make: Callable[[], Any]) -> tuple[Path, float, bool]:
    """The model file of that name in the cache, the seconds it took to make, whether it was there already."""
    import openvino

    folder = cache / name
    there = (folder / "made.json").is_file()
    if not there:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            start = time.perf_counter()
            openvino.save_model(make(), Path(temporary) / "new" / "model.xml", compress_to_fp16=False)
            seconds = {"seconds": time.perf_counter() - start}
            (Path(temporary) / "new" / "made.json").write_text(json.dumps(seconds))
            os.replace(Path(temporary) / "new", folder)
        gc.collect()
    return folder / "model.xml", json.loads((folder / "made.json").read_text())["seconds"], there


def _converted(net: Network, cache: Path) -> tuple[Path, float, bool]:
    import openvino

    def make() -> Any:
        shapes = [list(x.shape) for x in net.inputs]
        wide = _Positional(net)
        if net.module.dtype != torch.float32:  # bf16 constants make numbers that are not finite
            wide.module = copy.deepcopy(net.module).float()
        return openvino.convert_model(wide, example_input=net.inputs, input=shapes)

    return _kept(cache, f"{net.key()}-openvino-{openvino.get_version().split('-')[0]}", make)


def _quantized(net: Network, cache: Path) -> tuple[Path, float, bool]:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)

    def sample(seed: int) -> list[Any]:
        noise = torch.Generator().manual_seed(seed)
        times = torch.randint(0, 1000, (), generator=noise)
        return [(torch.randn(x.shape, generator=noise) if x.is_floating_point() else times).numpy()
                for x in net.inputs]

    def make() -> Any:
        return nncf.quantize(openvino.Core().read_model(_converted(net, cache)[0]),
                             nncf.Dataset([sample(i) for i in range(CALIBRATION_SAMPLES)]),
                             subset_size=CALIBRATION_SAMPLES, model_type=nncf.ModelType.TRANSFORMER)

    return _kept(cache, f"{net.key()}-nncf-{nncf.__version__}", make)


def openvino_call(model: Any, inputs: tuple[Tensor, ...], precision: str, threads: int) -> tuple[Call, dict[str, Any]]:
    """A compiled model (or its file) on these inputs; bf16 tensors go in and out as they are. precision: f32 or bf16.

    The facts hold what the plugin says of itself, which may differ from what was asked.
    """
    import openvino

    start = time.perf_counter()
    network = openvino.Core().compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
    seconds = time.perf_counter() - start
    request = network.create_infer_request()
    for i, x in enumerate(inputs):
        if x.dtype == torch.bfloat16:
            tensor = openvino.Tensor(x.view(torch.uint16).numpy(), list(x.shape), openvino.Type.bf16)
        else:
            tensor = openvino.Tensor(x.numpy(), shared_memory=True)
        request.set_input_tensor(i, tensor)

    def call() -> Tensor:
        request.infer()
        found = request.get_output_tensor(0)
        low = found.element_type == openvino.Type.bf16
        return torch.from_numpy(found.data.view("int16")).view(torch.bfloat16) if low else torch.from_numpy(found.data)

    told = {"precision": network.get_property("INFERENCE_PRECISION_HINT").to_string(),
            "threads": network.get_property("INFERENCE_NUM_THREADS")}
    return call, {"compile_s": seconds, "plugin": told}


def openvino(net: Network, precision: str, cache: Path, threads: int) -> Arm:
    """precision: f32, bf16, or int8 (W8A8 by nncf, the rest bf16)."""
    def build() -> tuple[Call, dict[str, Any]]:
        path, seconds, there = _converted(net, cache)
        facts = {"convert_s": seconds, "earlier_s": seconds * there}
        if precision == "int8":
            path, seconds, there = _quantized(net, cache)
            facts["quantize_s"] = seconds
            facts["earlier_s"] += seconds * there
        call, more = openvino_call(path, net.inputs, "f32" if precision == "f32" else "bf16", threads)
        return call, {**facts, **more}

    settings, version, size = f"inference precision {precision}, static shapes, LATENCY", package("openvino"), 8
    if precision == "int8":
        settings = (f"nncf.quantize, model_type transformer, {CALIBRATION_SAMPLES} samples of noise; the rest bf16, "
                    "static shapes, LATENCY")
        version, size = f"{version}, {package('nncf')}", 12
    return Arm(build, version, settings, net.parameters * size)


def openvino_attention(q: Tensor, k: Tensor, v: Tensor, threads: int) -> Arm:
    """scaled_dot_product_attention alone; q, k, v: (batch, heads, tokens, head_dim), contiguous as OpenVINO likes it,
    in the dtype it shall compute in."""
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[q.dtype]

    def build() -> tuple[Call, dict[str, Any]]:
        import openvino
        from openvino import opset13

        given = [opset13.parameter(list(x.shape), getattr(openvino.Type, precision)) for x in (q, k, v)]
        model = openvino.Model([opset13.scaled_dot_product_attention(*given)], given)
        return openvino_call(model, (q, k, v), precision, threads)

    return Arm(build, package("openvino"), f"opset13 scaled_dot_product_attention, {precision} in and out, LATENCY")

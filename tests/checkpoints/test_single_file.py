"""CompVis-layout files: configs inferred from shapes, names converted as diffusers' own converters do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compvis
import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils as oracle
from torch import Tensor, nn

from ldmfast.checkpoints import infer, open_single_file
from ldmfast.errors import CheckpointError
from ldmfast.models import REGISTRY

_VAE = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
_SD1 = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64, "attention_head_dim": 8}
_SD2 = {"block_out_channels": (64, 128, 128, 128), "cross_attention_dim": 96, "attention_head_dim": (1, 2, 2, 2),
        "use_linear_projection": True, "layers_per_block": 1}
_XL = {"block_out_channels": (64, 128, 256), "attention_head_dim": (1, 2, 4), "use_linear_projection": True,
       "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
       "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
       "transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time", "layers_per_block": 1,
       "addition_time_embed_dim": 8}
_REFINER = _XL | {"block_out_channels": (64, 128, 128, 128), "attention_head_dim": (1, 2, 2, 2),
                  "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                  "transformer_layers_per_block": 2}


def _text(hidden: int, layers: int, projection: int | None = None, act: str = "gelu") -> nn.Module:
    torch.manual_seed(hidden)
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1), projection_dim=projection or hidden, hidden_act=act,
        bos_token_id=0, eos_token_id=2, pad_token_id=1)
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    return kind(config).eval()


@dataclass
class Made:
    """A checkpoint in CompVis layout and the diffusers and transformers models that it was made from."""

    tensors: dict[str, Tensor]
    parts: dict[str, nn.Module]
    extra_layers: int = 0

    def write(self, folder: Path, metadata: dict[str, str] | None = None) -> Path:
        path = folder / "model.safetensors"
        safetensors.torch.save_file({k: v.clone() for k, v in self.tensors.items()}, path, metadata)
        return path


def _pipeline(unet: dict[str, Any], text: nn.Module | None, prefix: str, packed: bool = False,
              second: nn.Module | None = None, second_prefix: str = "") -> Made:
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"unet": diffusers.UNet2DConditionModel(**unet),
                                   "vae": diffusers.AutoencoderKL(**_VAE)}
    layers = unet.get("layers_per_block", 2)
    tensors = compvis.prefixed("model.diffusion_model.", compvis.unet(parts["unet"].state_dict(), layers))
    tensors |= compvis.prefixed("first_stage_model.", compvis.vae(parts["vae"].state_dict(), 4))
    if text is not None:
        state = compvis.wrapped(text.state_dict())
        tensors |= compvis.prefixed(prefix, compvis.open_clip(state) if packed else state)
        parts["text_encoder"] = text
    if second is not None:
        tensors |= compvis.prefixed(second_prefix, compvis.open_clip(compvis.wrapped(second.state_dict())))
        parts["text_encoder_2"] = second
    tensors |= {"alphas_cumprod": torch.rand(1000), "model_ema.decay": torch.tensor(0.9999),
                "global_step": torch.tensor(7)}
    return Made(tensors, parts)


def sd1(**change: Any) -> Made:
    made = _pipeline(_SD1 | change, _text(64, 2, act="quick_gelu"), "cond_stage_model.transformer.")
    made.tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return made


def sd2() -> Made:
    """SD 2 files hold 24 text layers and a projection; the models use 23 and none."""
    whole = _text(64, 24, 64)
    made = _pipeline(_SD2, None, "")
    packed = compvis.open_clip(compvis.wrapped(whole.state_dict()))
    made.tensors |= compvis.prefixed("cond_stage_model.model.", packed)
    used = _text(64, 23)
    state = compvis.wrapped(whole.state_dict())
    used.load_state_dict({k: state[f"text_model.{k.removeprefix('text_model.')}"] for k in used.state_dict()})
    made.parts["text_encoder"] = used
    return made


def sdxl() -> Made:
    unet = _XL | {"cross_attention_dim": 64 + 128, "projection_class_embeddings_input_dim": 96 + 6 * 8}
    return _pipeline(unet, _text(64, 3, act="quick_gelu"), "conditioner.embedders.0.transformer.",
                     second=_text(128, 2, 96), second_prefix="conditioner.embedders.1.model.")


def refiner() -> Made:
    unet = _REFINER | {"cross_attention_dim": 128, "projection_class_embeddings_input_dim": 96 + 5 * 8}
    return _pipeline(unet, None, "", second=_text(128, 2, 96), second_prefix="conditioner.embedders.0.model.")


MADE = {"sd1": sd1, "sd1_inpainting": lambda: sd1(in_channels=9), "sd1_pix2pix": lambda: sd1(in_channels=8),
        "sd1_classes": lambda: sd1(num_class_embeds=6), "sd2": sd2, "sdxl": sdxl, "sdxl_refiner": refiner}


@pytest.fixture(params=MADE)
def made(request: pytest.FixtureRequest) -> Made:
    return MADE[request.param]()


def test_configs_are_inferred(made: Made, tmp_path: Path) -> None:
    """Every key of the inferred config that shapes determine equals the config that the file was made from."""
    parts = open_single_file(made.write(tmp_path))
    assert set(made.parts) <= set(parts.names)
    for part in ("unet", "vae"):
        given, found = dict(made.parts[part].config), parts.config(part)
        for key, value in found.items():
            if key in ("_class_name", "sample_size", "scaling_factor", "force_upcast"):
                continue
            a, b = (list(v) if isinstance(v, (list, tuple)) else v for v in (given[key], value))
            if key in ("transformer_layers_per_block", "attention_head_dim"):
                # they act at levels with transformers, and the last also in the middle
                types = found["down_block_types"]
                acts = [t.startswith("Cross") or i == len(types) - 1 for i, t in enumerate(types)]
                a, b = ([x for x, on in zip(v if isinstance(v, list) else [v] * len(types), acts) if on]
                        for v in (a, b))
            assert a == b, (part, key)
    for part in ("text_encoder", "text_encoder_2"):
        if part in made.parts:
            given = made.parts[part].config
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
                        "num_attention_heads", "projection_dim", "eos_token_id", "max_position_embeddings"):
                assert parts.config(part)[key] == getattr(given, key), (part, key)
            assert parts.class_name(part) == type(made.parts[part]).__name__


def test_tensors_equal_diffusers_conversion(made: Made, tmp_path: Path) -> None:
    """Bit for bit what diffusers' converters make of the same file."""
    parts = open_single_file(made.write(tmp_path))
    unet = oracle.convert_ldm_unet_checkpoint(dict(made.tensors), dict(made.parts["unet"].config))
    vae = oracle.convert_ldm_vae_checkpoint(dict(made.tensors), dict(made.parts["vae"].config))
    expected = {"unet": unet, "vae": vae}
    if any(k.startswith("cond_stage_model.model.") for k in made.tensors):
        expected["text_encoder"] = oracle.convert_open_clip_checkpoint(
            made.parts["text_encoder"], dict(made.tensors))
    elif "text_encoder" in made.parts:
        clip = oracle.convert_ldm_clip_checkpoint(dict(made.tensors))
        expected["text_encoder"] = {k: v for k, v in clip.items() if not k.endswith("position_ids")}
    if "text_encoder_2" in made.parts:
        number = "1" if "text_encoder" in made.parts else "0"
        expected["text_encoder_2"] = oracle.convert_open_clip_checkpoint(
            made.parts["text_encoder_2"], dict(made.tensors), f"conditioner.embedders.{number}.model.")
    for part, tensors in expected.items():
        ours = parts.weights(part)
        assert ours.keys() == tensors.keys(), part
        assert all(torch.equal(ours[k], v) for k, v in tensors.items()), part


def test_round_trip_gives_the_same_network(made: Made, tmp_path: Path) -> None:
    """diffusers model -> CompVis file -> inferred config and weights -> the same output as the native model of
    the original, and the same tensors."""
    parts = open_single_file(made.write(tmp_path))
    for part in ("unet", "vae"):
        theirs = made.parts[part]
        ours = REGISTRY[parts.class_name(part)][1].from_weights(parts.config(part), parts.weights(part))
        direct = REGISTRY[parts.class_name(part)][1].from_weights(dict(theirs.config), theirs.state_dict())
        assert all(torch.equal(v, direct.state_dict()[k]) for k, v in ours.state_dict().items())
        if part == "vae":
            z = torch.randn(1, 4, 4, 4)
            assert torch.equal(ours.decode(z), direct.decode(z))
            continue
        c = theirs.config
        call: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 7, c.cross_attention_dim)}
        if c.addition_embed_type:
            numbers = (c.projection_class_embeddings_input_dim - 96) // 8
            call["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 96), "time_ids": torch.rand(2, numbers)}
        if c.num_class_embeds:
            call["class_labels"] = torch.tensor([0, 5])
        x = torch.randn(2, c.in_channels, 8, 8)
        assert torch.equal(ours(x, 3, **call), direct(x, 3, **call))


def test_text_encoder_gives_the_same_prompt(tmp_path: Path) -> None:
    made = sdxl()
    parts = open_single_file(made.write(tmp_path))
    tokens = torch.randint(3, 99, (2, 77))
    for part in ("text_encoder", "text_encoder_2"):
        theirs = made.parts[part]
        ours = type(theirs)(transformers.CLIPTextConfig(**parts.config(part))).eval()
        weights = parts.weights(part)
        if not any(k.startswith("text_model.") for k in ours.state_dict()):
            weights = {k.removeprefix("text_model."): v for k, v in weights.items()}
        ours.load_state_dict(weights)
        with torch.no_grad():
            a = ours(tokens, output_hidden_states=True)
            b = theirs(tokens, output_hidden_states=True)
        assert all(torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states))


def test_index_scheduler_and_tokenizer(tmp_path: Path) -> None:
    parts = open_single_file(sdxl().write(tmp_path))
    assert parts.index["_class_name"] == "StableDiffusionXLPipeline"
    assert parts.names == ["text_encoder", "text_encoder_2", "unet", "vae", "scheduler", "tokenizer", "tokenizer_2"]
    assert parts.config("scheduler")["_class_name"] == "EulerDiscreteScheduler"
    assert parts.config("tokenizer")["pad_token"] == "<|endoftext|>" and parts.config("tokenizer_2")["pad_token"] == "!"
    assert parts.config("vae")["scaling_factor"] == 0.13025 and parts.config("unet")["sample_size"] == 128
    assert parts.folder("tokenizer") is None and parts.files == [tmp_path / "model.safetensors"]
    parts = open_single_file(sd1(in_channels=9).write(tmp_path))
    assert parts.index["_class_name"] == "StableDiffusionInpaintPipeline"
    assert parts.config("scheduler")["_class_name"] == "PNDMScheduler"
    assert parts.config("vae")["scaling_factor"] == 0.18215
    with pytest.raises(CheckpointError, match="has no part 'text_encoder_2'; it has text_encoder, unet"):
        parts.config("text_encoder_2")


_SD2_UNET = {"use_linear_projection": True, "cross_attention_dim": 1024, "in_channels": 4}


@pytest.mark.parametrize("unet, metadata, names, override, expected", [
    (_SD2_UNET, {}, {}, None, "v_prediction"),
    (_SD2_UNET, {}, {}, "epsilon", "epsilon"),
    (_SD2_UNET, {"modelspec.resolution": "512x512"}, {}, None, "epsilon"),
    (_SD2_UNET, {"modelspec.prediction_type": "epsilon"}, {"v_pred": ()}, None, "epsilon"),
    (_SD2_UNET | {"in_channels": 9}, {}, {}, None, "epsilon"),
    (_SD2_UNET | {"num_class_embeds": 1000}, {}, {}, None, "epsilon"),
    (_SD2_UNET | {"cross_attention_dim": 2048}, {}, {}, None, "epsilon"),
    (_SD2_UNET | {"cross_attention_dim": 2048}, {}, {"v_pred": ()}, None, "v_prediction"),
    (_SD2_UNET | {"use_linear_projection": False}, {"modelspec.prediction_type": "v"}, {}, None, "v_prediction"),
])
def test_prediction_type(unet, metadata, names, override, expected) -> None:
    assert infer.prediction_type(unet, metadata, names, override) == expected


def test_prediction_type_override(tmp_path: Path) -> None:
    path = sd1().write(tmp_path)
    assert open_single_file(path).config("scheduler")["prediction_type"] == "epsilon"
    parts = open_single_file(path, prediction_type="v_prediction")
    assert parts.config("scheduler")["prediction_type"] == "v_prediction"
    with pytest.raises(CheckpointError, match="prediction_type 'x' is unknown"):
        open_single_file(path, prediction_type="x")


def test_real_sizes_are_inferred() -> None:
    """SDXL's real shapes, without its data."""
    config = {"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
              "transformer_layers_per_block": (1, 2, 10), "projection_class_embeddings_input_dim": 2816,
              "addition_time_embed_dim": 256, "layers_per_block": 2}
    with torch.device("meta"):
        state = diffusers.UNet2DConditionModel(**_XL | config).state_dict()
    shapes = {k: tuple(v.shape) for k, v in compvis.unet(state, 2).items()}
    found = infer.unet_config(shapes, 1280)
    assert all(found[k] == (list(v) if isinstance(v, tuple) else v) for k, v in config.items())
    assert infer.unet_config(shapes)["addition_time_embed_dim"] == 256 and found["norm_num_groups"] == 32


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_files_with_one_part(kind: str, tmp_path: Path) -> None:
    """ComfyUI keeps UNets and VAEs in files of their own, without a prefix."""
    made = sd1()
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[kind]
    made.tensors = {k.removeprefix(prefix): v for k, v in made.tensors.items() if k.startswith(prefix)}
    parts = open_single_file(made.write(tmp_path))
    weights = parts.weights(kind, torch.bfloat16)
    own = made.parts[kind].state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[k], v.bfloat16()) for k, v in own.items())


def test_ckpt_through_the_weights_only_loader(tmp_path: Path) -> None:
    made = sd1()
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": made.tensors, "global_step": 7}, path)
    parts = open_single_file(path)
    own = made.parts["unet"].state_dict()
    assert all(torch.equal(v, own[k]) for k, v in parts.weights("unet").items())
    torch.save({"state_dict": made.tensors, "hook": re.compile("x")}, path)
    with pytest.raises(CheckpointError, match="weights-only loader refuses it"):
        open_single_file(path)


@pytest.mark.parametrize("spoil, message", [
    (lambda t: t.pop("model.diffusion_model.out.2.weight"), "tensor 'out.2.weight' with 4 dimensions is missing"),
    (lambda t: t.update({"model.diffusion_model.new.weight": torch.ones(1)}), "'new.weight' has no place"),
    (lambda t: [t.pop(k) for k in list(t) if ".input_blocks.5." in k], "input_blocks are numbered"),
    (lambda t: [t.pop(k) for k in list(t) if ".middle_block.1." in k], "transformer depths are"),
    (lambda t: [t.pop(k) for k in list(t) if "layers.0." in k], r"text encoder has layers \[1\]"),
    (lambda t: [t.pop(k) for k in list(t) if "." in k], "holds no part of SD 1, SD 2 or SDXL"),
])
def test_incomplete_files(spoil, message: str, tmp_path: Path) -> None:
    made = sd1()
    spoil(made.tensors)
    path = made.write(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_single_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)

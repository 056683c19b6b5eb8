"""Diffusers folders: parts, variants, shards, PyTorch files, old names, and what is wrong with a bad one."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch

from ldmfast.checkpoints import inspect, open_folder
from ldmfast.errors import CheckpointError
from ldmfast.models import REGISTRY

_UNET = {"block_out_channels": (32, 64), "cross_attention_dim": 48, "norm_num_groups": 8, "attention_head_dim": 4,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1}
_VAE = {"block_out_channels": (16, 32), "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.fixture(scope="module")
def pipeline() -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**_VAE), unet=diffusers.UNet2DConditionModel(**_UNET), text_encoder=None,
        tokenizer=None, scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


@pytest.mark.parametrize("save, variant", [
    ({}, None), ({"variant": "fp16"}, "fp16"), ({"max_shard_size": "300KB"}, None),
    ({"max_shard_size": "300KB", "variant": "fp16"}, "fp16"), ({"safe_serialization": False}, None),
    ({"safe_serialization": False, "variant": "fp16"}, "fp16"),
])
def test_reads_what_diffusers_writes(pipeline, save: dict, variant: str | None, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, **save)
    parts = open_folder(tmp_path, variant)
    assert parts.names == ["scheduler", "unet", "vae"]
    assert parts.index["_class_name"] == "StableDiffusionPipeline"
    assert parts.config("scheduler")["_class_name"] == "DDIMScheduler"
    for part in ("unet", "vae"):
        own = getattr(pipeline, part).state_dict()
        found = parts.weights(part)
        assert found.keys() == own.keys() and all(torch.equal(v, own[k]) for k, v in found.items())
        native = REGISTRY[parts.class_name(part)][1]
        model = native.from_weights(parts.config(part), parts.weights(part, torch.bfloat16))
        assert model.dtype == torch.bfloat16
    if "max_shard_size" in save:
        assert len(parts.part_files("unet")) > 1
    files = [f for f in tmp_path.rglob("diffusion*") if f.suffix in (".safetensors", ".bin")]
    assert sorted(parts.files) == sorted(files)


def test_one_model_alone(pipeline, tmp_path: Path) -> None:
    pipeline.vae.save_pretrained(tmp_path)
    parts = open_folder(tmp_path)
    assert parts.names == ["model"] and parts.class_name("model") == "AutoencoderKL"
    assert parts.weights("model").keys() == pipeline.vae.state_dict().keys()


def test_variant_falls_back_per_part_but_not_altogether(pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no variant 'fp16'; leave variant out"):
        open_folder(tmp_path, "fp16")
    pipeline.unet.half().save_pretrained(tmp_path / "unet", variant="fp16")
    pipeline.unet.float()
    parts = open_folder(tmp_path, "fp16")
    assert parts.weights("unet")["conv_in.bias"].dtype == torch.float16
    assert parts.weights("vae")["quant_conv.bias"].dtype == torch.float32
    with pytest.raises(CheckpointError, match="has no variant 'bf16'; it has fp16"):
        open_folder(tmp_path, "bf16")
    os.remove(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no weights .*; there are variants: fp16"):
        open_folder(tmp_path).weights("unet")


def test_old_attention_names(pipeline, tmp_path: Path) -> None:
    """Autoencoders saved before 2023 call the projections query, key, value and proj_attn."""
    pipeline.vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    own = safetensors.torch.load_file(file)
    old = {}
    for name, tensor in own.items():
        for new, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        old[name] = tensor
    assert len(set(old) - set(own)) == 16
    safetensors.torch.save_file(old, file)
    found = open_folder(tmp_path).weights("model")
    assert found.keys() == own.keys() and all(torch.equal(v, own[k]) for k, v in found.items())


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["LDMFAST_TEST_MARK"],)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_never_run(name: str, zipped: bool, pipeline, tmp_path: Path, monkeypatch) -> None:
    mark = tmp_path / "executed"
    monkeypatch.setenv("LDMFAST_TEST_MARK", str(mark))
    pipeline.vae.save_pretrained(tmp_path)
    os.remove(tmp_path / "diffusion_pytorch_model.safetensors")
    if zipped:
        torch.save({"a": Payload()}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(CheckpointError) as caught:
        open_folder(tmp_path).weights("model")
    assert name in str(caught.value) and "\n" not in str(caught.value) and not mark.exists()


def test_content_decides_not_the_ending(pipeline, tmp_path: Path) -> None:
    pipeline.vae.save_pretrained(tmp_path)
    os.rename(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "diffusion_pytorch_model.bin")
    assert open_folder(tmp_path).weights("model").keys() == pipeline.vae.state_dict().keys()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("spoil, act, message", [
    (lambda f: None, lambda f: open_folder(f / "none"), "does not exist"),
    (lambda f: os.remove(f / "model_index.json"), open_folder, "has no model_index.json"),
    (lambda f: _write(f / "model_index.json", "{"), open_folder, "is not valid JSON"),
    (lambda f: _write(f / "model_index.json", "[]"), open_folder, "holds a list, needs a JSON object"),
    (lambda f: _write(f / "model_index.json", "[" * 100000), open_folder, "is not valid JSON"),
    (lambda f: None, lambda f: open_folder(f).config("text_encoder"), "has no part 'text_encoder'; it has scheduler"),
    (lambda f: os.remove(f / "vae" / "config.json"), lambda f: open_folder(f).config("vae"), "has no config.json"),
    (lambda f: _write(f / "model_index.json", json.dumps({"../x": ["diffusers", "X"]})),
     lambda f: open_folder(f).config("../x"), "the folder ../x/ is missing"),
    (lambda f: _write(f / "vae" / "diffusion_pytorch_model.safetensors", "{}" * 20),
     lambda f: open_folder(f).weights("vae"), "claims a header of"),
])
def test_what_is_wrong_is_named(spoil, act, message: str, pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        act(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("weight_map, message", [
    ({"a": "../../secret.safetensors"}, "that is not a file beside it"), ({"a": 5}, "that is not a file beside it"),
    ({"a": "gone-00001.safetensors"}, "shard is missing"), ({}, "has no weight_map"), ("x", "has no weight_map"),
])
def test_bad_indices(weight_map, message: str, pipeline, tmp_path: Path) -> None:
    pipeline.vae.save_pretrained(tmp_path)
    os.remove(tmp_path / "diffusion_pytorch_model.safetensors")
    _write(tmp_path / "diffusion_pytorch_model.safetensors.index.json", json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_folder(tmp_path).weights("model")


def test_inspect_folder(pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    report = inspect(tmp_path)
    assert report.kind == "diffusers folder, StableDiffusionPipeline"
    by_name = {p.name: p for p in report.parts}
    unet = pipeline.unet.state_dict()
    assert by_name["unet"].tensors == len(unet) and by_name["unet"].dtypes == {"float32": len(unet)}
    assert by_name["unet"].parameters == sum(t.numel() for t in unet.values())
    assert by_name["unet"].nbytes == 4 * by_name["unet"].parameters and by_name["scheduler"].tensors == 0
    assert "UNet2DConditionModel" in str(report) and str(tmp_path) in str(report)


@pytest.mark.parametrize("names, kind", [
    (["lora_unet_down_blocks_0.lora_down.weight"], "LoRA (kohya layout)"), (["x.lora_A.weight"], "LoRA (peft layout)"),
    (["control_model.input_blocks.0.0.weight"], "ControlNet (CompVis layout)"), (["y"], "unknown model"),
])
def test_inspect_other_files(names: list[str], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({n: torch.ones(3) for n in names}, path, {"format": "pt"})
    report = inspect(path)
    assert report.kind == kind and report.nbytes == 12 * len(names) and report.metadata == {"format": "pt"}
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "none")


@pytest.fixture
def shards(pipeline, tmp_path: Path) -> tuple[Path, dict]:
    """(folder, index) of a VAE in three shards or more."""
    pipeline.vae.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 3
    return tmp_path, index


def test_a_tensor_in_two_shards(shards) -> None:
    folder, index = shards
    first, second, *_ = sorted(set(index["weight_map"].values()))
    tensors = safetensors.torch.load_file(folder / second)
    twice = next(iter(safetensors.torch.load_file(folder / first)))
    safetensors.torch.save_file(tensors | {twice: torch.ones(1)}, folder / second)
    with pytest.raises(CheckpointError, match=f"tensor '{twice}' is in .*, too"):
        open_folder(folder).weights("model")


@pytest.mark.parametrize("change, message", [
    (lambda m, names: m.update({"quant_conv.bias": next(n for n in names if n != m["quant_conv.bias"])}),
     "says that tensor 'quant_conv.bias' is in .*, it is in diffusion"),
    (lambda m, names: m.update({"more": names[0]}), "says that tensor 'more' is in .*, it is in no shard"),
    (lambda m, names: m.update({"quant_conv.bias": ["x"]}), "that is not a file beside it"),
    (lambda m, names: m.update({"quant_conv.bias": "/etc/hosts"}), "that is not a file beside it"),
    (lambda m, names: m.update({"quant_conv.bias": ".."}), "that is not a file beside it"),
    (lambda m, names: m.update({"quant_conv.bias": "x" * 5000}), "shard is missing"),
    (lambda m, names: m.update({"quant_conv.bias": "a\0b"}), "that is not a file beside it"),
])
def test_indices_that_do_not_fit(shards, change, message: str) -> None:
    folder, index = shards
    change(index["weight_map"], sorted(set(index["weight_map"].values())))
    _write(folder / "diffusion_pytorch_model.safetensors.index.json", json.dumps(index))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_folder(folder).weights("model")
    assert len(str(caught.value)) < 600


def test_a_part_cannot_lead_out_of_the_folder(pipeline, tmp_path: Path) -> None:
    """A part named ".." once passed as a folder name of its own, and read the parent's config."""
    inner = tmp_path / "inner"
    pipeline.vae.save_pretrained(tmp_path)
    _write(inner / "model_index.json", json.dumps({"..": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(CheckpointError, match="is missing"):
        open_folder(inner).config("..")

"""8-bit floats: plain storage, ComfyUI's scaled storage, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch

from ldmfast.checkpoints import open_folder, open_single_file
from ldmfast.checkpoints.open_file import open_file
from ldmfast.errors import CheckpointError
from ldmfast.models import UNet2DCondition

_UNET = {"block_out_channels": (32, 64), "cross_attention_dim": 48, "norm_num_groups": 8, "attention_head_dim": 4,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_folder_in_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    """diffusers stores fp8 like any dtype; it is widened as the tensors are read, and computes in what was asked."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**_UNET)
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    small = {k: v.to(dtype) for k, v in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(small, file)
    parts = open_folder(tmp_path)
    assert {t.kind for t in parts.tensors("model").values()} == {str(dtype).removeprefix("torch.")}
    model = UNet2DCondition.from_weights(parts.config("model"), parts.stream("model", torch.bfloat16))
    own = model.state_dict()
    assert model.dtype == torch.bfloat16 and own.keys() == small.keys()
    assert all(torch.equal(own[k], v.to(torch.bfloat16)) for k, v in small.items())


def _scaled(scale: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    weight = torch.linspace(-400, 400, 12).view(3, 4).to(torch.float8_e4m3fn)
    return {"a.weight": weight, "a.scale_weight": scale, "a.bias": torch.ones(3), "a.scale_input": torch.ones(()),
            "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, weight


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_are_applied(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors, weight = _scaled(torch.full(shape, 0.0123))
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path)
    file = open_file(path)
    assert set(file.tensors) == {"a.weight", "a.bias"}
    assert file.tensors["a.weight"].kind == "float8_e4m3fn, scaled"
    expected = weight.double() * torch.tensor(0.0123).double()
    for mapped in (True, False):
        found = dict(file.read(mapped=mapped))
        assert found.keys() == {"a.weight", "a.bias"} and found["a.weight"].dtype == torch.float32
        assert (found["a.weight"] - expected).abs().max() <= 400 * 0.0123 * 2**-23
        assert torch.equal(dict(file.read(["a.weight"], torch.bfloat16, mapped=mapped))["a.weight"],
                           found["a.weight"].bfloat16())


@pytest.mark.parametrize("change, message", [
    ({"a.scale_weight": torch.ones(3)}, r"'a.scale_weight' of shape \[3\] is not one factor"),
    ({"a.weight": torch.ones(3, 4)}, "is not one factor of an fp8 tensor 'a.weight'"),
    ({"b.scale_weight": torch.ones(())}, "is not one factor of an fp8 tensor 'b.weight'"),
    ({"a.weight_scale": torch.ones(3)}, "'a.weight_scale' belongs to a quantised layout that is not supported"),
    ({"a.comfy_quant": torch.ones(3)}, "'a.comfy_quant' belongs to a quantised layout"),
    ({"a.weight.quant_state.bitsandbytes__nf4": torch.ones(3)}, "belongs to a quantised layout"),
    ({"a.SCB": torch.ones(3)}, "'a.SCB' belongs to a quantised layout"),
])
def test_other_ways_of_scaling_are_refused_by_name(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(_scaled(torch.ones(()))[0] | change, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_single_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)

"""The same LoRA in every layout comes to the same matrices; names and settings that diffusers' converters know."""

from __future__ import annotations

import json
import math

import diffusers
import lora_cases as make
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file

import ldmfast
from ldmfast import loras
from ldmfast.checkpoints import to_ldm
from ldmfast.loras import kohya
from ldmfast.models import UNet2DCondition, UNet2DConditionConfig


@pytest.fixture(scope="module")
def theirs():
    return make.diffusers_pipeline()


@pytest.fixture(scope="module")
def networks():
    """Packed, so that products are joined, and as they come."""
    pipe, plain = ldmfast.Pipeline.tiny(), make.diffusers_pipeline()
    return {"packed": {"unet": pipe.unet, "text_encoder": pipe.components["text_encoder"]},
            "plain": {c: ldmfast.models.from_diffusers(getattr(plain, c)) for c in ("unet", "text_encoder")}}


def deltas(adapter: loras.Adapter) -> dict[tuple[str, str], torch.Tensor]:
    return {(component, path): p.up.double() @ p.down.flatten(1).double()
            for component, table in adapter.parts.items() for path, p in table.items()}


@pytest.mark.parametrize("state", ["packed", "plain"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers' kohya", "processors", "metadata", "network_alphas"])
def test_layouts(theirs, networks, tmp_path, layout, state):
    lora = make.draw(theirs, 1)
    given = {**networks[state]}
    file = tmp_path / "lora.safetensors"
    if layout == "kohya":
        save_file(make.kohya(lora), file)
        found = loras.load(file, given)
    elif layout == "diffusers' kohya":  # as diffusers writes it: alphas are the ranks
        lora = {n: make.Matrices(m.down, m.up, len(m.down)) for n, m in lora.items()}
        found = loras.load(convert_state_dict_to_kohya(make.lora_a_b(lora)), given)
    elif layout == "processors":
        save_file(make.processors(lora), file)
        found = loras.load(str(file), given)
    elif layout == "metadata":
        save_file(make.lora_a_b(lora), file, {"lora_adapter_metadata": json.dumps(make.metadata(lora))})
        found = loras.load(file, given)
    else:
        found = loras.load(make.lora_a_b(lora), given, network_alphas=make.alphas(lora))
    wanted: dict[tuple[str, str], torch.Tensor] = {}
    for component, network in given.items():
        for name, slot in loras.adapter.slots(network).items():
            stem = "unet." if component == "unet" else "text_encoder.text_model."
            rows = wanted.setdefault((component, slot.path), torch.zeros(
                slot.shape[0] * slot.parts, math.prod(slot.shape[1:]), dtype=torch.float64))
            rows[slot.part * slot.shape[0]:(slot.part + 1) * slot.shape[0]] = lora[stem + name].delta.flatten(1)
    got = deltas(found)
    assert got.keys() == wanted.keys() and len(got) > 100
    for key, delta in wanted.items():
        torch.testing.assert_close(got[key], delta, rtol=0, atol=1e-6 * float(delta.abs().max()))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft(theirs, networks, tmp_path, rslora):
    lora = make.draw(theirs, 2, components=["unet"], wanted=lambda n: n.endswith(("to_q", "ff.net.2", "conv1")))
    save_file({k.replace("unet.", "base_model.model.", 1).replace("lora_A.", "lora_A.default."): v
               for k, v in make.lora_a_b(lora).items()}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 3.0, "use_rslora": rslora, "target_modules": ["to_q"],
              "alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 7.0}, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    got = deltas(loras.load(tmp_path, networks["plain"]))
    assert len(got) == len(lora)
    for name, m in lora.items():
        alpha = 7.0 if name.endswith("mid_block.attentions.0.transformer_blocks.0.attn1.to_q") else 3.0
        rank = len(m.down)
        wanted = m.delta.flatten(1) / m.alpha * alpha * (math.sqrt(rank) if rslora else 1)
        torch.testing.assert_close(got["unet", name.removeprefix("unet.")], wanted, rtol=0, atol=1e-6)


def test_sdxl_names_are_those_of_diffusers_converter():
    """Every layer of SDXL's UNet, spelled as kohya does on CompVis' network, through diffusers' own converter."""
    settings = {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
                "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816}
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**settings)
        ours = UNet2DCondition(UNet2DConditionConfig(**settings))
    names = [n for n, m in theirs.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    table = kohya.spellings("unet", loras.adapter.slots(ours), ["input_blocks_0_0"])
    layout = to_ldm.Layout.of(f"{n}." for n in names)
    compared = 0
    for name in names:
        old = to_ldm.rename("unet", f"{name}.weight", layout).name.removesuffix(".weight").replace(".", "_")
        assert table[old] == table[name.replace(".", "_")] == name
        keys = {f"lora_unet_{old}.lora_{which}.weight": torch.zeros(1, 1) for which in ("down", "up")}
        mapped = _maybe_map_sgm_blocks_to_diffusers(dict(keys), theirs.config)
        converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
        down = next(k for k in converted if "down.weight" in k)
        found = down.removeprefix("unet.").replace(".processor", "").replace("_lora.down.weight", "").replace(
            ".lora.down.weight", "")
        compared += (found + ".0" if found.endswith("to_out") else found) == name
    assert compared == len(names) > 700

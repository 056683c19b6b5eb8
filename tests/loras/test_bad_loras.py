"""What is no LoRA for this model is refused by name, and leaves the pipeline as it was."""

from __future__ import annotations

import json

import lora_cases as make
import pytest
import torch
from safetensors.torch import save_file

import ldmfast
from ldmfast.errors import CheckpointError, LdmfastError

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = torch.ones(4, 96), torch.ones(96, 4)


@pytest.fixture(scope="module")
def pipe():
    return ldmfast.Pipeline.tiny()


def good(**more):
    return {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP, **more}


BAD = {
    "LoHa": ({f"{KOHYA}.hada_w1_a": DOWN}, "hada_w1_a.*LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": DOWN}, "lokr_w1.*LoKr"),
    "Tucker": (good(**{f"{KOHYA}.lora_mid.weight": torch.ones(4, 4, 3, 3)}), "lora_mid.*LoCon"),
    "DoRA of kohya": ({f"{KOHYA}.dora_scale": DOWN}, "dora_scale.*DoRA"),
    "DoRA of peft": (good(**{f"{Q}.lora_magnitude_vector": UP}), "lora_magnitude_vector.*DoRA"),
    "biases": (good(**{f"{Q}.lora_B.bias": UP[:, 0]}), "LoRA with biases"),
    "difference": ({f"{KOHYA}.diff": DOWN}, "full difference"),
    "a model": ({"unet.conv_in.weight": torch.ones(96, 8, 3, 3)}, r"conv_in\.weight.*no layout known"),
    "down alone": ({f"{Q}.lora_A.weight": DOWN}, "lora_A.*without the up matrix"),
    "alpha alone": ({f"{KOHYA}.alpha": torch.tensor(1.0)}, "alpha.*without the down matrix"),
    "two ranks": (good() | {f"{Q}.lora_B.weight": UP[:, :3]}, r"\(4, 96\).*\(96, 3\).*one rank"),
    "rank 0": ({f"{Q}.lora_A.weight": DOWN[:0], f"{Q}.lora_B.weight": UP[:, :0]}, "one rank"),
    "wider model": ({f"{Q}.lora_A.weight": torch.ones(4, 320), f"{Q}.lora_B.weight": torch.ones(320, 4)},
                    r"to_q.*\(4, 320\).*\(96, 96\)"),
    "kernel": ({"unet.conv_in.lora_A.weight": torch.ones(4, 8), "unet.conv_in.lora_B.weight": UP},
               r"conv_in.*\(4, 8\).*\(96, 8, 3, 3\)"),
    "unknown layer": ({"unet.mid_block.nothing.lora_A.weight": DOWN, "unet.mid_block.nothing.lora_B.weight": UP},
                      r"mid_block\.nothing.*no place in unet"),
    "unknown kohya layer": ({"lora_unet_mid_nothing.lora_down.weight": DOWN,
                             "lora_unet_mid_nothing.lora_up.weight": UP}, "mid_nothing.*no place in unet"),
    "second encoder": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": DOWN,
                        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": UP}, "te2.*only unet, text_enc"),
    "same layer twice": (good(**{f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}), "same layer"),
    "alpha of two numbers": (good(**{f"{Q}.alpha": torch.ones(2)}), r"alpha.*shape \(2,\)"),
    "alpha NaN": (good(**{f"{Q}.alpha": torch.tensor(float("nan"))}), "alpha.*finite"),
    "NaN": (good() | {f"{Q}.lora_A.weight": DOWN * float("nan")}, "to_q.*NaN"),
    "integers": (good() | {f"{Q}.lora_A.weight": DOWN.int()}, "torch.int32"),
    "nothing": ({}, "holds no tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tensors(pipe, name):
    given, message = BAD[name]
    before = pipe.loaded
    with pytest.raises(CheckpointError, match=message) as error:
        pipe.load_lora_weights(given, "x")
    assert "\n" not in str(error.value) and pipe.loaded is before
    assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []


@pytest.mark.parametrize("config, message", [
    ({"unet.use_dora": True}, "use_dora"), ({"unet.alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
    ({"unet.lora_alpha": "many"}, "not readable"), ({"unet.lora_alpha": 1e999}, "finite"), ([1], "not readable"),
    ({"unet.bias": "all"}, "bias")])
def test_bad_settings_of_peft(pipe, tmp_path, config, message):
    file = tmp_path / "lora.safetensors"
    save_file(good(), file, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora_weights(file)
    assert pipe.get_list_adapters() == {}


def test_bad_files(pipe, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        pipe.load_lora_weights(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="weight_name"):
        pipe.load_lora_weights(tmp_path)
    save_file(good(), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match="cut"):
        pipe.load_lora_weights(tmp_path, weight_name="cut.safetensors")
    with pytest.raises(LdmfastError, match="a int"):
        pipe.load_lora_weights(3)


def test_bad_arguments():
    pipe = ldmfast.Pipeline.tiny()
    lora = make.draw(make.diffusers_pipeline(), 1, components=["unet"], wanted=lambda n: n.endswith("to_q"))
    pipe.load_lora_weights(make.kohya(lora), "a")
    call = {"prompt": make.PROMPT, "num_inference_steps": 1, "progress": False}
    for wrong, message in (
            (lambda: pipe.load_lora_weights(make.kohya(lora), "a"), "loaded or fused already"),
            (lambda: pipe.set_adapters("b"), "no adapter 'b'; loaded are a"),
            (lambda: pipe.set_adapters("a", [1.0, 2.0]), "2 weights"),
            (lambda: pipe.set_adapters(["a", "a"]), "each adapter once"),
            (lambda: pipe.set_adapters("a", "strong"), "'strong'"),
            (lambda: pipe.set_adapters("a", float("nan")), "nan"),
            (lambda: pipe.set_adapters("a", {"vae": 1}), "no 'vae'"),
            (lambda: pipe.set_adapters("a", {"unet": {"down": {"block_7": 1}}}), "no 'block_7'.*block_0, block_1"),
            (lambda: pipe.set_adapters("a", {"unet": {"down": {"block_0": [1, 2, 3]}}}), "3 weights.*1 attentions"),
            (lambda: pipe.delete_adapters("b"), "no adapter 'b'"),
            (lambda: pipe.fuse_lora(["vae"]), "no component 'vae'"),
            (lambda: pipe(**call, loras="b"), "no adapter 'b'"),
            (lambda: pipe(**call, loras=["a", "a"]), "2 entries for 1 pictures"),
            (lambda: pipe(**call, loras=3), "a int")):
        before = pipe.loaded
        with pytest.raises(LdmfastError, match=message):
            wrong()
        assert pipe.loaded is before
    with pytest.warns(UserWarning, match="changes nothing"):
        pipe.set_adapters("a", {"text_encoder": 0.5})
    pipe.fuse_lora()
    for wrong in (lambda: pipe.delete_adapters("a"), lambda: pipe.set_adapters("a"), lambda: pipe(**call, loras="a")):
        with pytest.raises(LdmfastError, match=r"unfuse_lora\(\) first"):
            wrong()

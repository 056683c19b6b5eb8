"""The text encoders against transformers' on the same weights: every output, both precisions, every way to load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from model_cases import randomise

import ldmfast
from ldmfast import CheckpointError, LdmfastError, ShapeError
from ldmfast.models import CLIPTextModel, CLIPTextModelWithProjection, from_diffusers

TINY = Path(ldmfast.__file__).parent / "assets" / "tiny" / "text_encoder"

# reduced widths of SD 1's encoder (SDXL's first), SD 2's, SDXL's second, and one whose end token is not the highest id
CASES = {
    "sd1": ("CLIPTextModel", {"eos_token_id": 2}),
    "sd2": ("CLIPTextModel", {"hidden_act": "gelu", "num_hidden_layers": 4, "eos_token_id": 2}),
    "sdxl_2": ("CLIPTextModelWithProjection", {"hidden_act": "gelu", "projection_dim": 40, "eos_token_id": 2}),
    "first_eos": ("CLIPTextModel", {"eos_token_id": 50, "hidden_size": 60, "num_attention_heads": 3}),
    "first_eos_projected": ("CLIPTextModelWithProjection", {"eos_token_id": 50, "projection_dim": 24}),
}


def build(name: str, **change):
    kind, config = CASES[name]
    base = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 99, "max_position_embeddings": 21, "bos_token_id": 0, "pad_token_id": 1}
    return randomise(getattr(transformers, kind)(transformers.CLIPTextConfig(**base | config | change)))


def tokens(n: int = 3, length: int = 21) -> torch.Tensor:
    """Ends of texts at several places, several of them in a row, and higher ids before and after the end."""
    ids = torch.randint(3, 50, (n, length), generator=torch.Generator().manual_seed(n))
    for row, end in zip(ids, (length - 1, 5, 9)):
        row[end:] = 50
        row[-1] = 98
        row[end // 2] = 97
    ids[0, -1] = 50
    return ids


def outputs(out) -> dict[str, torch.Tensor]:
    names = ("text_embeds", "last_hidden_state", "pooler_output")
    found = {n: getattr(out, n) for n in names if getattr(out, n, None) is not None}
    return found | {f"hidden {i}": s for i, s in enumerate(out.hidden_states)}


def agree(ours, theirs, **call) -> None:
    with torch.no_grad():
        a = ours(**call, output_hidden_states=True)
        b = theirs(**call, output_hidden_states=True)
    found, expected = outputs(a), outputs(b)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert (found[key] - value).abs().max() <= 1e-4 * value.square().mean().sqrt(), key
    assert torch.equal(a[0], ours(**call)[0]) and a[0].shape == b[0].shape


@pytest.mark.parametrize("name", CASES)
def test_all_outputs(name):
    theirs = build(name)
    for packed in (False, True):
        ours = type(from_diffusers(theirs)).from_weights(theirs.config.to_dict(), theirs.state_dict(), pack=packed)
        for ids in (tokens(), tokens(1), tokens(2, 13)):
            agree(ours, theirs, input_ids=ids)
        mask = torch.ones(3, 21)
        mask[1, 7:] = 0
        agree(ours, theirs, input_ids=tokens(), attention_mask=mask)
        agree(ours, theirs, input_ids=tokens(), attention_mask=torch.ones(3, 21, dtype=torch.int64))


def test_the_two_conventions_differ_on_these_tokens():
    """Otherwise the pooled rows above could not tell one from the other."""
    ids = tokens()
    assert not torch.equal(ids.argmax(-1), (ids == 50).int().argmax(-1))


@pytest.mark.parametrize("name", ["sd1", "sdxl_2"])
def test_bf16_is_as_near_as_transformers(name):
    theirs, ids = build(name), tokens()
    low = from_diffusers(theirs, precision="bf16")
    with torch.no_grad():
        exact = outputs(theirs(ids, output_hidden_states=True))
        ours = outputs(low(ids, output_hidden_states=True))
        rounded = outputs(theirs.to(torch.bfloat16)(ids, output_hidden_states=True))
    for key, value in exact.items():
        band = 2 * (rounded[key].float() - value).abs().max() + 2**-8 * value.abs().max()
        assert ours[key].dtype == torch.bfloat16 and 0 < (ours[key].float() - value).abs().max() <= band, key


def test_the_shipped_encoder():
    theirs = transformers.CLIPTextModel.from_pretrained(TINY).eval()
    ours = ldmfast.Pipeline.tiny().components["text_encoder"]
    assert isinstance(ours, CLIPTextModel) and ours.device.type == "cpu" and ours.dtype == torch.float32
    ids = torch.randint(0, 678, (3, 32), generator=torch.Generator().manual_seed(0))
    ids[:, 20:] = 679
    agree(ours, theirs, input_ids=ids)


@pytest.mark.parametrize("name", ["sd1", "sdxl_2"])
@pytest.mark.parametrize("prefix", [True, False])
def test_names_with_and_without_prefix(name, prefix):
    theirs = build(name)
    state = {k.removeprefix("text_model."): v for k, v in theirs.state_dict().items()}
    if prefix:
        state = {k if k.startswith("text_projection") else f"text_model.{k}": v for k, v in state.items()}
    kind = CLIPTextModel if name == "sd1" else CLIPTextModelWithProjection
    agree(kind.from_weights(theirs.config.to_dict(), iter(state.items())), theirs, input_ids=tokens())


def test_transformers_model_is_not_imported(tmp_path):
    """Loading and calling a pipeline leaves transformers' model code, its heaviest import, alone."""
    code = ("import sys, ldmfast\n"
            "ldmfast.Pipeline.tiny()('a red circle', num_inference_steps=1, progress=False)\n"
            "print('transformers.models.clip.modeling_clip' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_folder_saved_by_transformers(tmp_path):
    """Any keys that transformers writes into config.json are taken, and a damaged folder is named."""
    theirs = build("sdxl_2")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"temperature": 1.0, "dropout": 0.0}
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    agree(CLIPTextModelWithProjection.from_weights(config, state), theirs, input_ids=tokens())
    with pytest.raises(CheckpointError, match=r"text_projection\.weight.*has no place"):
        CLIPTextModel.from_weights(config, state)
    del state["text_projection.weight"]
    with pytest.raises(CheckpointError, match=r"missing.*text_projection"):
        CLIPTextModelWithProjection.from_weights(config, state)


def test_bad_input():
    ours = from_diffusers(build("sd1"))
    for ids, error, pattern in ((torch.zeros(1, 22).long(), ShapeError, "at most 21"),
                                (torch.zeros(5).long(), ShapeError, r"\(5,\)"),
                                (torch.full((1, 4), 99), LdmfastError, "99.*99 tokens"),
                                (torch.full((1, 4), -1), LdmfastError, "-1")):
        with pytest.raises(error, match=pattern):
            ours(ids)
    with pytest.raises(ShapeError, match=r"attention_mask.*\(1, 3\)"):
        ours(tokens(1), torch.ones(1, 3))
    for change, pattern in (({"hidden_act": "tanh"}, "hidden_act.*tanh"), ({"num_attention_heads": 5}, "5.*64")):
        config = build("sd1").config.to_dict() | change
        with pytest.raises(CheckpointError, match=pattern):
            CLIPTextModel.from_config(config)
    assert ours(torch.zeros(0, 7).long()).last_hidden_state.shape == (0, 7, 64)

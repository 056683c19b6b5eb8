"""DiT and PixArt against diffusers on the same random weights, every config, and the ways they are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from model_cases import draw, error, randomise, rms
from test_full_size import filled
from torch import Tensor, nn

from ldmfast.errors import CheckpointError, LdmfastError, ShapeError
from ldmfast.models import DiT, DiTConfig, Model, PixArt, from_diffusers, transformer_blocks

FP32 = 1e-4  # of the output's RMS: the project's parity bound in exact precision
Conditions = dict[str, Any]


@dataclass(frozen=True)
class Case:
    kind: str
    config: dict[str, Any]
    conditions: Callable[[int], Conditions]
    sizes: tuple[tuple[int, int], ...]

    def build(self) -> nn.Module:
        return randomise(getattr(diffusers, self.kind)(**self.config))

    def sample(self, n: int, size: tuple[int, int]) -> Tensor:
        return draw(n, self.config.get("in_channels", 4), *size, seed=3)


def labels(n: int) -> Conditions:
    return {"class_labels": torch.tensor([1, 10, 1, 0])[:n]}


def prompt(n: int, dim: int = 20) -> Conditions:
    return {"encoder_hidden_states": draw(n, 11, dim, seed=2)}


def masked(n: int) -> Conditions:
    """Prompts of 5, 8 and 3 tokens, one of them with a hole; the last three tokens are nobody's."""
    mask = torch.tensor([[1] * 5 + [0] * 6, [1, 0] + [1] * 6 + [0] * 3, [1] * 3 + [0] * 8])
    return prompt(n) | {"encoder_attention_mask": mask[:n]}


def prefix(n: int) -> Conditions:
    """Prompts of different length, one of a single token; masks that hide only their ends."""
    ends = torch.tensor([[1], [5], [5]])
    return prompt(n) | {"encoder_attention_mask": (torch.arange(11) < ends[:n]).long()}


def micro(n: int) -> Conditions:
    return prompt(n) | {"added_cond_kwargs": {
        "resolution": torch.tensor([[512.0, 300.0], [128.0, 90.0], [512.0, 300.0]])[:n],
        "aspect_ratio": torch.tensor([[0.6], [1.4], [0.6]])[:n]}}


_DIT = {"num_attention_heads": 4, "attention_head_dim": 18, "num_layers": 3, "sample_size": 8, "out_channels": 8,
        "num_embeds_ada_norm": 10}
_PIXART = {"num_attention_heads": 4, "attention_head_dim": 18, "num_layers": 3, "sample_size": 16,
           "cross_attention_dim": 72, "caption_channels": 20}
_SQUARE, _RAGGED = ((8, 8), (12, 12)), ((16, 16), (10, 26))


def dit(**changes: Any) -> Case:
    sizes = tuple((s * changes.get("patch_size", 2) // 2,) * 2 for s in (8, 14))
    return Case("DiTTransformer2DModel", _DIT | changes, labels, sizes)


def pixart(conditions: Callable[[int], Conditions] = prompt, **changes: Any) -> Case:
    return Case("PixArtTransformer2DModel", _PIXART | changes, conditions, _RAGGED)


CASES = {
    "dit": dit(),
    "dit_patch_4": dit(patch_size=4),
    "dit_patch_8": dit(patch_size=8, sample_size=32),
    "dit_no_variance": dit(out_channels=None, in_channels=3),
    "dit_geglu_affine": dit(activation_fn="geglu", norm_elementwise_affine=True, attention_bias=False),
    "dit_gelu": dit(activation_fn="gelu"),
    "pixart": pixart(),
    "pixart_masked": pixart(masked),
    "pixart_prefix": pixart(prefix),
    "pixart_micro": pixart(micro, use_additional_conditions=True),
    "pixart_sigma": pixart(masked, interpolation_scale=2),
    "pixart_no_captions": pixart(lambda n: prompt(n, 72), caption_channels=None),
}


@cache
def pair(name: str) -> tuple[nn.Module, Model]:
    theirs = CASES[name].build()
    return theirs, from_diffusers(theirs)


def diffusers_out(module: nn.Module, sample: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
    if isinstance(module, diffusers.PixArtTransformer2DModel):
        conditions.setdefault("added_cond_kwargs", {"resolution": None, "aspect_ratio": None})
    with torch.no_grad():
        return module(sample, timestep=timestep, **conditions).sample


@pytest.mark.parametrize("name", CASES)
def test_matches_diffusers(name: str) -> None:
    case, (theirs, ours) = CASES[name], pair(name)
    for size in case.sizes:
        for n in (1, 3):
            sample, conditions = case.sample(n, size), case.conditions(n)
            for t in (torch.full((n,), 37), torch.tensor([0, 999, 37])[:n]):
                expected = diffusers_out(theirs, sample, t, **conditions)
                got = ours(sample, t, **conditions)
                assert got.shape == expected.shape and got.is_contiguous(memory_format=torch.channels_last)
                assert error(got, expected) <= FP32, (name, size, n, t)


@pytest.mark.parametrize("name", ["dit", "dit_geglu_affine", "pixart_masked", "pixart_prefix", "pixart_micro"])
def test_bfloat16_is_as_good_as_diffusers(name: str) -> None:
    """Against float64, at most twice the error that diffusers makes in bfloat16."""
    case, n = CASES[name], 3
    theirs, sample, conditions = case.build(), case.sample(3, case.sizes[1]), case.conditions(n)
    t = torch.full((n,), 37)
    ours = from_diffusers(theirs, precision="bf16")

    def cast(x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, dict):
            return {k: cast(v, dtype) for k, v in x.items()}
        return x.to(dtype) if x.is_floating_point() else x

    got = ours(sample, t, **conditions)
    low = theirs.to(torch.bfloat16)
    rounded = diffusers_out(low, sample.bfloat16(), t, **cast(conditions, torch.bfloat16))
    exact = diffusers_out(case.build().double(), sample.double(), t, **cast(conditions, torch.float64))
    assert got.dtype == torch.bfloat16
    assert rms(got.double() - exact) <= 2 * rms(rounded.double() - exact)


@pytest.mark.parametrize("name", ["dit", "pixart_masked"])
def test_int8(name: str) -> None:
    """Every large product of the blocks is in 8 bits, nothing else, and the error is what that costs: measured 0.01 to
    0.02 of the RMS in the blocks, so 0.05 leaves out a wrong scale."""
    case, (_, exact) = CASES[name], pair(name)
    ours = from_diffusers(case.build(), precision="int8")
    eight = {n.removeprefix("transformer_blocks.0.") for n, m in ours.named_modules()
             if getattr(m, "int8", None) is not None and n.startswith("transformer_blocks.0.")}
    cross = {"attn2.to_q", "attn2.to_out.0"} if name.startswith("pixart") else set()
    assert eight == {"attn1.to_qkv", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"} | cross
    assert all(n.startswith("transformer_blocks.") for n, m in ours.named_modules() if getattr(m, "int8", None))
    sample, conditions = case.sample(3, case.sizes[0]), case.conditions(3)
    wanted = exact(sample, 500, **conditions)
    assert 0 < rms(ours(sample, 500, **conditions).float() - wanted) <= 0.05 * rms(wanted)


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("name", ["dit", "pixart_micro", "pixart_masked", "pixart_prefix"])
def test_prepared_state_gives_the_same_bits(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One state for many timesteps equals the computation step by step, also where it is too large to hold all."""
    case = CASES[name]
    ours = from_diffusers(case.build(), precision=precision)
    sample, conditions = case.sample(3, case.sizes[0]), case.conditions(3)
    times = [999.0, 41.0, *map(float, range(100, 140)), 1.0]
    states = [ours.prepare(times, **conditions)]
    monkeypatch.setattr(transformer_blocks, "_MOST_HELD", 1 << 10)
    states.append(ours.prepare(times, **conditions))
    assert name != "dit" or (states[0].rows is not None and states[1].rows is None)
    monkeypatch.undo()
    mixed = torch.tensor([1.0, 999.0, 41.0])
    for state in states:
        for t in (999.0, 41.0, mixed):
            assert torch.equal(ours(sample, t, state=state), ours(sample, t, **conditions))


def test_a_packed_dit_keeps_one_of_equal_embedders() -> None:
    """Original weights have one; diffusers' layout repeats it in every block. Blocks that differ keep their own."""
    theirs = CASES["dit"].build()
    emb = [b.norm1.emb for b in theirs.transformer_blocks]
    emb[2].load_state_dict(emb[0].state_dict())
    ours = from_diffusers(theirs, precision="bf16")
    kept = [b.norm1.emb for b in ours.transformer_blocks]
    assert kept[2] is kept[0] and kept[1] is not kept[0]
    sample, conditions = CASES["dit"].sample(2, (8, 8)), labels(2)
    expected = diffusers_out(theirs, sample, torch.tensor([5, 5]), **conditions)
    assert rms(ours(sample, 5, **conditions).float() - expected) <= 0.02 * rms(expected)


def test_full_width_dit() -> None:
    """One block of DiT-XL/2."""
    theirs = filled(lambda: diffusers.DiTTransformer2DModel(num_layers=1, out_channels=8), 0)
    theirs.pos_embed.pos_embed = diffusers.models.embeddings.PatchEmbed(32, 32, 2, 4, 1152).pos_embed
    sample, conditions, t = draw(2, 4, 32, 32), {"class_labels": torch.tensor([207, 1000])}, torch.tensor([500, 500])
    ours = from_diffusers(theirs)
    assert ours.config == DiTConfig.named("DiT-XL/2", num_layers=1)
    assert error(ours(sample, t, **conditions), diffusers_out(theirs, sample, t, **conditions)) <= FP32


def test_full_width_pixart() -> None:
    """One block of PixArt alpha, 1024 pixels, with what it is conditioned on."""
    theirs = filled(lambda: diffusers.PixArtTransformer2DModel(num_layers=1, caption_channels=4096), 0)
    theirs.pos_embed.pos_embed = diffusers.models.embeddings.PatchEmbed(
        128, 128, 2, 4, 1152, interpolation_scale=2).pos_embed
    mask = (torch.arange(120) < torch.tensor([[20], [3]])).long()
    conditions = {"encoder_hidden_states": draw(2, 120, 4096, seed=2), "encoder_attention_mask": mask,
                  "added_cond_kwargs": {"resolution": torch.tensor([[1024.0, 512.0]] * 2),
                                        "aspect_ratio": torch.tensor([[2.0]] * 2)}}
    sample, t = draw(2, 4, 32, 16), torch.tensor([500, 500])
    got = from_diffusers(theirs)(sample, t, **conditions)
    assert error(got, diffusers_out(theirs, sample, t, **conditions)) <= FP32


@pytest.mark.parametrize("name, layers, channels, heads, patch", [
    ("DiT-S/8", 12, 384, 6, 8), ("DiT-B/4", 12, 768, 12, 4), ("DiT-L/2", 24, 1024, 16, 2),
    ("SiT-XL/2", 28, 1152, 16, 2)])
def test_named_configs(name: str, layers: int, channels: int, heads: int, patch: int) -> None:
    """The parameter counts of the paper's table 1, within its rounding."""
    config = DiTConfig.named(name)
    assert (config.num_layers, config.channels, config.num_attention_heads, config.patch_size) == (
        layers, channels, heads, patch)
    with torch.device("meta"):
        model = DiT.from_config(config)
    millions = {"S": 33, "B": 131, "L": 458, "XL": 675}[name[4:].split("/")[0]]
    repeated = sum(p.numel() for p in model.transformer_blocks[0].norm1.emb.parameters()) * (layers - 1)
    assert abs((sum(p.numel() for p in model.parameters()) - repeated) / 1e6 - millions) < 0.02 * millions + 1


def test_no_pictures() -> None:
    for name in ("dit", "pixart_masked"):
        case, (_, ours) = CASES[name], pair(name)
        assert ours(case.sample(0, (8, 8)), 5, **case.conditions(0)).shape == (0, 8, 8, 8)


@pytest.mark.parametrize("name, sample, conditions, match", [
    ("dit", (2, 4, 9, 8), labels(2), "multiples of the patch size 2"),
    ("dit", (2, 3, 8, 8), labels(2), r"needs \(pictures, 4, height, width\)"),
    ("dit", (3, 4, 8, 8), labels(2), "3 pictures, the conditions were given for 2"),
    ("dit", (2, 4, 8, 8), {"class_labels": torch.tensor([0, 11])}, r"reach 0\.\.11.*10 for none"),
    ("dit", (2, 4, 8, 8), {}, "pass class_labels"),
    ("pixart", (2, 4, 8, 8), prompt(2, 21), r"needs \(pictures, tokens, 20\)"),
    ("pixart", (2, 4, 8, 8), prompt(3), "conditions were given for 3"),
    ("pixart_micro", (2, 4, 8, 8), prompt(2), "added_cond_kwargs lacks resolution"),
    ("pixart_micro", (2, 4, 8, 8), micro(1) | prompt(2), "2 and 1 numbers for each of 2 pictures"),
])
def test_refuses(name: str, sample: tuple[int, ...], conditions: Conditions, match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        pair(name)[1](torch.zeros(sample), 5, **conditions)


def test_refuses_configs_and_states() -> None:
    with pytest.raises(CheckpointError, match="norm_type"):
        DiT.from_config({"norm_type": "ada_norm"})
    with pytest.raises(CheckpointError, match="ask for 161 blocks"):
        DiT.from_config({"num_layers": 161})
    with pytest.raises(CheckpointError, match="patch_size"):
        PixArt.from_config({"patch_size": 0})
    with pytest.raises(LdmfastError, match="is not a DiT"):
        DiTConfig.named("DiT-XL/3")
    _, ours = pair("dit")
    state = ours.prepare([5.0], **labels(1))
    with pytest.raises(LdmfastError, match=r"6\.0 was not prepared"):
        ours(torch.zeros(1, 4, 8, 8), 6, state=state)
    with pytest.raises(LdmfastError, match="together with a prepared state"):
        ours(torch.zeros(1, 4, 8, 8), 5, state=state, **labels(1))

"""DiT, SiT and PixArt in the layouts of their first releases, against diffusers on the same weights."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from ldmfast import checkpoints
from ldmfast.checkpoints.convert import convert
from ldmfast.errors import CheckpointError
from ldmfast.models import DiT, PixArt


def random(module: torch.nn.Module) -> torch.nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.2))
    return module.eval()


def linear(name: str, module: torch.nn.Linear) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": module.weight.detach(), f"{name}.bias": module.bias.detach()}


def joined(name: str, *modules: torch.nn.Linear) -> dict[str, torch.Tensor]:
    return {f"{name}.{leaf}": torch.cat([getattr(m, leaf).detach() for m in modules]) for leaf in ("weight", "bias")}


def common(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What both layouts have: qkv in one piece, the positions stored."""
    tensors = linear("x_embedder.proj", model.pos_embed.proj) | {"pos_embed": model.pos_embed.pos_embed}
    for i, block in enumerate(model.transformer_blocks):
        attention, mlp = block.attn1, block.ff.net
        tensors |= joined(f"blocks.{i}.attn.qkv", attention.to_q, attention.to_k, attention.to_v)
        tensors |= linear(f"blocks.{i}.attn.proj", attention.to_out[0])
        tensors |= linear(f"blocks.{i}.mlp.fc1", mlp[0].proj) | linear(f"blocks.{i}.mlp.fc2", mlp[2])
    return tensors


def dit() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A DiT as it was trained (norms with 1e-6, frequencies without a shift) and its tensors, renamed by hand."""
    model = random(diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, num_layers=2, sample_size=8, out_channels=8,
        num_embeds_ada_norm=10, norm_eps=1e-6))
    embedder = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb = embedder  # one for all blocks
    embedder.time_proj.downscale_freq_shift = 0
    tensors = common(model)
    tensors |= linear("t_embedder.mlp.0", embedder.timestep_embedder.linear_1)
    tensors |= linear("t_embedder.mlp.2", embedder.timestep_embedder.linear_2)
    tensors["y_embedder.embedding_table.weight"] = embedder.class_embedder.embedding_table.weight.detach()
    for i, block in enumerate(model.transformer_blocks):
        tensors |= linear(f"blocks.{i}.adaLN_modulation.1", block.norm1.linear)
    tensors |= linear("final_layer.adaLN_modulation.1", model.proj_out_1)
    return model, tensors | linear("final_layer.linear", model.proj_out_2)


def pixart(size: int, micro: bool, tokens: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    sigma = tokens == 300
    model = random(diffusers.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=64, num_layers=2, sample_size=size, cross_attention_dim=192,
        caption_channels=20, use_additional_conditions=micro, interpolation_scale=size / 64 if sigma else None))
    embedder, tensors = model.adaln_single.emb, common(model)
    for old, new in (("t_embedder", "timestep_embedder"), ("csize_embedder", "resolution_embedder"),
                     ("ar_embedder", "aspect_ratio_embedder")):
        if micro or new == "timestep_embedder":
            tensors |= linear(f"{old}.mlp.0", getattr(embedder, new).linear_1)
            tensors |= linear(f"{old}.mlp.2", getattr(embedder, new).linear_2)
    tensors |= linear("t_block.1", model.adaln_single.linear)
    tensors |= linear("y_embedder.y_proj.fc1", model.caption_projection.linear_1)
    tensors |= linear("y_embedder.y_proj.fc2", model.caption_projection.linear_2)
    tensors["y_embedder.y_embedding"] = torch.randn(tokens, 20)
    for i, block in enumerate(model.transformer_blocks):
        tensors[f"blocks.{i}.scale_shift_table"] = block.scale_shift_table.detach()
        tensors |= linear(f"blocks.{i}.cross_attn.q_linear", block.attn2.to_q)
        tensors |= joined(f"blocks.{i}.cross_attn.kv_linear", block.attn2.to_k, block.attn2.to_v)
        tensors |= linear(f"blocks.{i}.cross_attn.proj", block.attn2.to_out[0])
    tensors["final_layer.scale_shift_table"] = model.scale_shift_table.detach()
    return model, tensors | linear("final_layer.linear", model.proj_out)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("ending, prefix", [("safetensors", ""), ("pt", ""), ("safetensors", "model.diffusion_model.")])
def test_dit(tmp_path: Path, ending: str, prefix: str) -> None:
    theirs, tensors = dit()
    path = tmp_path / f"DiT.{ending}"
    (torch.save if ending == "pt" else save_file)({prefix + k: v.contiguous() for k, v in tensors.items()}, path)
    ours = DiT.from_single_file(path)
    x, t, y = torch.randn(2, 4, 12, 12), torch.tensor([3, 980]), torch.tensor([10, 4])
    with torch.no_grad():
        close(ours(x, t, class_labels=y), theirs(x, timestep=t, class_labels=y).sample)
    assert len({id(block.norm1.emb) for block in ours.transformer_blocks}) == 1
    assert str(checkpoints.inspect(path)).startswith(f"{path}: DiT in its original layout")


@pytest.mark.parametrize("size, micro, tokens", [(16, False, 120), (128, True, 120), (128, False, 300),
                                                 (32, False, 300)])
def test_pixart(tmp_path: Path, size: int, micro: bool, tokens: int) -> None:
    """alpha of small and of 1024 pixels, and sigma, which stretches its positions at every size."""
    theirs, tensors = pixart(size, micro, tokens)
    path = tmp_path / "PixArt.pth"
    torch.save({"state_dict": {k: v.contiguous() for k, v in tensors.items()}}, path)
    ours = PixArt.from_single_file(path)
    x, t, prompt = torch.randn(1, 4, 8, 12), torch.tensor([700]), torch.randn(1, 5, 20)
    sizes = {"resolution": torch.tensor([[64.0, 96.0]]), "aspect_ratio": torch.tensor([[0.6]])} if micro else None
    with torch.no_grad():
        expected = theirs(x, prompt, t, {"resolution": None, "aspect_ratio": None} | (sizes or {})).sample
    close(ours(x, t, prompt, added_cond_kwargs=sizes), expected)


def test_converted_folder_gives_the_same_numbers(tmp_path: Path) -> None:
    theirs, tensors = pixart(16, False, 120)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "PixArt.safetensors")
    convert(tmp_path / "PixArt.safetensors", tmp_path / "folder", progress=False)
    loaded = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "folder").eval()
    x, t, prompt = torch.randn(1, 4, 8, 8), torch.tensor([700]), torch.randn(1, 5, 20)
    with torch.no_grad():
        sizes = {"resolution": None, "aspect_ratio": None}
        close(loaded(x, prompt, t, sizes).sample, theirs(x, prompt, t, sizes).sample)


@pytest.mark.parametrize("change, match", [
    (lambda t: t.pop("final_layer.linear.weight"), "'final_layer.linear.weight' with 2 dimensions is missing"),
    (lambda t: t.pop("blocks.1.mlp.fc1.bias"), "1 of .* tensors are missing"),
    (lambda t: t.update({"blocks.0.attn.q_norm.weight": torch.ones(64)}), "'blocks.0.attn.q_norm.weight' has no place"),
    (lambda t: t.update({"blocks.0.attn.qkv.weight": torch.ones(100, 128)}), r"has shape \[100, 128\]"),
    (lambda t: t.update({"blocks.5.mlp.fc1.bias": torch.ones(4)}), r"numbered \[0, 1, 5\]"),
])
def test_refuses(tmp_path: Path, change, match: str) -> None:
    _, tensors = dit()
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "DiT.safetensors")
    with pytest.raises(CheckpointError, match=match):
        DiT.from_single_file(tmp_path / "DiT.safetensors")

"""SD 3 and FLUX in the layouts of their first releases, against diffusers on the same weights; a file of FLUX' size."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import resident
import torch
from safetensors.torch import save_file
from test_transformer_files import joined, linear, random

from ldmfast import checkpoints
from ldmfast.errors import CheckpointError
from ldmfast.models import FluxTransformer2D, SD3Transformer2D

Tensors = dict[str, torch.Tensor]


def swapped(name: str, module: torch.nn.Linear) -> Tensors:
    """Shift before scale, as the originals have them."""
    return {k: torch.cat(list(v.chunk(2))[::-1]) for k, v in linear(name, module).items()}


def gains(attention, text: bool, query: str, key: str) -> Tensors:
    q, k = ("norm_added_q", "norm_added_k") if text else ("norm_q", "norm_k")
    return {query: getattr(attention, q).weight.detach(), key: getattr(attention, k).weight.detach()}


def qkv(name: str, attention, text: bool = False) -> Tensors:
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if text else ("to_q", "to_k", "to_v")
    return joined(name, *(getattr(attention, n) for n in names))


def flux_pair(guidance: bool) -> tuple[torch.nn.Module, Tensors]:
    """A FLUX (heads of 32: axes of 4, 14 and 14) and its tensors, renamed by hand."""
    model = random(diffusers.FluxTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, num_single_layers=3, num_attention_heads=2,
        attention_head_dim=32, joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 14, 14),
        guidance_embeds=guidance))
    embed = model.time_text_embed
    embedders = {"time_in": embed.timestep_embedder, "vector_in": embed.text_embedder}
    if guidance:
        embedders["guidance_in"] = embed.guidance_embedder
    tensors = linear("img_in", model.x_embedder) | linear("txt_in", model.context_embedder)
    for name, part in embedders.items():
        tensors |= linear(f"{name}.in_layer", part.linear_1) | linear(f"{name}.out_layer", part.linear_2)
    for i, block in enumerate(model.transformer_blocks):
        b, attention = f"double_blocks.{i}.", block.attn
        tensors |= linear(b + "img_mod.lin", block.norm1.linear) | linear(b + "txt_mod.lin", block.norm1_context.linear)
        for side, text in (("img", False), ("txt", True)):
            norm = f"{b}{side}_attn.norm."
            tensors |= qkv(f"{b}{side}_attn.qkv", attention, text)
            tensors |= gains(attention, text, norm + "query_norm.scale", norm + "key_norm.scale")
            ff = (block.ff_context if text else block.ff).net
            tensors |= linear(f"{b}{side}_mlp.0", ff[0].proj) | linear(f"{b}{side}_mlp.2", ff[2])
        tensors |= linear(b + "img_attn.proj", attention.to_out[0]) | linear(b + "txt_attn.proj", attention.to_add_out)
    for i, block in enumerate(model.single_transformer_blocks):
        b, attention = f"single_blocks.{i}.", block.attn
        tensors |= linear(b + "modulation.lin", block.norm.linear) | linear(b + "linear2", block.proj_out)
        tensors |= joined(b + "linear1", attention.to_q, attention.to_k, attention.to_v, block.proj_mlp)
        tensors |= gains(attention, False, b + "norm.query_norm.scale", b + "norm.key_norm.scale")
    tensors |= linear("final_layer.linear", model.proj_out)
    return model, tensors | swapped("final_layer.adaLN_modulation.1", model.norm_out.linear)


def sd3_pair(medium: bool) -> tuple[torch.nn.Module, Tensors]:
    """An SD 3, or 3.5 medium, and its tensors, renamed by hand. The table of positions is random, too."""
    more = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)} if medium else {}
    model = random(diffusers.SD3Transformer2DModel(
        sample_size=128, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=128, pooled_projection_dim=20, pos_embed_max_size=6, **more))
    model.pos_embed.pos_embed.copy_(torch.randn(1, 36, 128, generator=torch.Generator().manual_seed(3)))
    embed = model.time_text_embed
    tensors = linear("x_embedder.proj", model.pos_embed.proj) | {"pos_embed": model.pos_embed.pos_embed.clone()}
    for name, part in (("t_embedder", embed.timestep_embedder), ("y_embedder", embed.text_embedder)):
        tensors |= linear(f"{name}.mlp.0", part.linear_1) | linear(f"{name}.mlp.2", part.linear_2)
    tensors |= linear("context_embedder", model.context_embedder)
    for i, block in enumerate(model.transformer_blocks):
        x, text, last = f"joint_blocks.{i}.x_block.", f"joint_blocks.{i}.context_block.", i == 2
        tensors |= linear(x + "adaLN_modulation.1", block.norm1.linear)
        tensors |= (swapped if last else linear)(text + "adaLN_modulation.1", block.norm1_context.linear)
        tensors |= qkv(x + "attn.qkv", block.attn) | qkv(text + "attn.qkv", block.attn, True)
        tensors |= linear(x + "attn.proj", block.attn.to_out[0])
        tensors |= linear(x + "mlp.fc1", block.ff.net[0].proj) | linear(x + "mlp.fc2", block.ff.net[2])
        if not last:
            tensors |= linear(text + "attn.proj", block.attn.to_add_out)
            tensors |= linear(text + "mlp.fc1", block.ff_context.net[0].proj)
            tensors |= linear(text + "mlp.fc2", block.ff_context.net[2])
        if medium:
            for part, of in ((x, False), (text, True)):
                tensors |= gains(block.attn, of, part + "attn.ln_q.weight", part + "attn.ln_k.weight")
        if block.attn2 is not None:
            tensors |= qkv(x + "attn2.qkv", block.attn2) | linear(x + "attn2.proj", block.attn2.to_out[0])
            tensors |= gains(block.attn2, False, x + "attn2.ln_q.weight", x + "attn2.ln_k.weight")
    tensors |= linear("final_layer.linear", model.proj_out)
    return model, tensors | swapped("final_layer.adaLN_modulation.1", model.norm_out.linear)


def write(path: Path, tensors: Tensors, prefix: str = "") -> Path:
    save_file({prefix + k: v.contiguous().clone() for k, v in tensors.items()}, path)
    return path


CASES = {"flux_dev": (lambda: flux_pair(True), ""),
         "flux_schnell": (lambda: flux_pair(False), "model.diffusion_model."),
         "sd3": (lambda: sd3_pair(False), "model.diffusion_model."), "sd3.5_medium": (lambda: sd3_pair(True), "")}


@pytest.mark.parametrize("name", CASES)
def test_original_layout(name: str, tmp_path: Path) -> None:
    build, prefix = CASES[name]
    theirs, tensors = build()
    path = write(tmp_path / "model.safetensors", tensors, prefix)
    parts = checkpoints.open_single_file(path)
    config = parts.config("transformer")
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.config.items()
            if not k.startswith("_")} == {k: v for k, v in config.items() if not k.startswith("_")}
    found, wanted = dict(parts.stream("transformer")), theirs.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    stored = parts.tensors("transformer")
    assert {k: t.shape for k, t in stored.items()} == {k: tuple(t.shape) for k, t in wanted.items()}
    assert sum(t.nbytes for t in stored.values()) == sum(t.nbytes for t in tensors.values())
    ours = (FluxTransformer2D if name.startswith("flux") else SD3Transformer2D).from_single_file(path)
    g = torch.Generator().manual_seed(1)
    given = {"encoder_hidden_states": torch.randn(1, 5, 24, generator=g),
             "pooled_projections": torch.randn(1, 20, generator=g)}
    sample, time = torch.randn(1, 4, 8, 10, generator=g), torch.tensor([500.0])
    if name.startswith("flux"):
        sample, time = torch.randn(1, 6, 16, generator=g), torch.tensor([0.5])
        given |= {"img_ids": torch.rand(6, 3, generator=g) * 9, "txt_ids": torch.zeros(5, 3)}
        given |= {"guidance": torch.tensor([3.5])} if name == "flux_dev" else {}
    with torch.no_grad():
        expected = theirs(hidden_states=sample, timestep=time, **given).sample
    assert (ours(sample, time, **given) - expected).abs().max() <= 1e-4 * expected.square().mean().sqrt()
    kind = "Flux" if name.startswith("flux") else "SD3"
    assert str(checkpoints.inspect(path)).splitlines()[0].startswith(f"{path}: {kind} in its original layout")


@pytest.mark.parametrize("missing, message", [
    ("img_in.weight", "img_in.weight"), ("double_blocks.0.img_attn.norm.query_norm.scale", "query_norm.scale"),
    ("single_blocks.1.linear1.weight", "tensors are missing"), (None, "single_blocks are numbered"),
    ("rows", "has shape"), ("unknown", "has no place")])
def test_damaged_files_are_refused(missing: str | None, message: str, tmp_path: Path) -> None:
    _, tensors = flux_pair(True)
    if missing is None:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("single_blocks.1.")}
    elif missing == "rows":
        tensors["single_blocks.0.linear1.weight"] = tensors["single_blocks.0.linear1.weight"][:-1]
    elif missing == "unknown":
        tensors["double_blocks.0.nonsense"] = torch.zeros(1)
    else:
        del tensors[missing]
    path = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        FluxTransformer2D.from_single_file(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def sparse_flux(path: Path) -> int:
    """A file like FLUX.1-dev's, 11.9 billion numbers in bf16, of which the disk holds only the header; its bytes."""
    _, tensors = flux_pair(True)
    full: dict[str, list[int]] = {}
    blocks: dict[str, dict[str, list[int]]] = {"double_blocks": {}, "single_blocks": {}}
    real = {24: 4096, 16: 64, 20: 768, 32: 128}  # other sizes are multiples of the width, 64
    for name, tensor in tensors.items():
        sinusoids = name in ("time_in.in_layer.weight", "guidance_in.in_layer.weight")
        shape = [real.get(n, n // 64 * 3072) for n in tensor.shape]
        shape[1:] = [256] if sinusoids else shape[1:]
        kind, _, rest = name.partition(".")
        number, _, leaf = rest.partition(".")
        if kind not in blocks:
            full[name] = shape
        elif number == "0":
            blocks[kind][leaf] = shape
    for kind, copies in (("double_blocks", 19), ("single_blocks", 38)):
        full |= {f"{kind}.{i}.{leaf}": shape for i in range(copies) for leaf, shape in blocks[kind].items()}
    header, offset = {}, 0
    for name, shape in full.items():
        count = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


@resident.NEEDED
def test_a_checkpoint_of_flux_size_is_inspected_and_streamed_without_being_held(tmp_path: Path) -> None:
    """Two blocks are streamed, and no more than some tensors (the largest has 132 MB) are in memory. (A first meter
    read 0 here: a child's ru_maxrss, which starts at its parent's.)"""
    path = tmp_path / "flux.safetensors"
    size = sparse_flux(path)
    assert 23.7e9 < size < 23.9e9 and path.stat().st_blocks * 512 < 1 << 20
    code = """
import json, sys
from pathlib import Path
from ldmfast import checkpoints
from ldmfast.models import FluxTransformer2DConfig

def look():
    global report, parts, config
    report = checkpoints.inspect(Path(sys.argv[1]))
    parts = checkpoints.open_single_file(Path(sys.argv[1]))
    config = FluxTransformer2DConfig.from_dict(parts.config("transformer"))

def stream():
    global read
    for name, tensor in parts.stream("transformer"):
        read += tensor.nbytes
        if name.startswith("transformer_blocks.2."):
            break

read = 0
told, streamed = resident.peak(look), resident.peak(stream)
print(json.dumps({"parameters": sum(p.parameters for p in report.parts), "nbytes": report.nbytes, "told": told,
                  "streamed": streamed, "read": read, "layers": [config.num_layers, config.num_single_layers],
                  "guidance": config.guidance_embeds, "axes": config.axes_dims_rope, "kind": report.kind}))
"""
    found = json.loads(resident.fresh(code, path))
    print({k: f"{found[k] / resident.MIB:.1f} MiB" for k in ("told", "streamed")})
    assert found["parameters"] == size // 2 and found["nbytes"] == size
    assert (found["layers"], found["guidance"], found["axes"]) == ([19, 38], True, [16, 56, 56])
    assert found["read"] > 1.3e9
    assert found["told"] < 32 << 20 and found["streamed"] < 400 << 20, found

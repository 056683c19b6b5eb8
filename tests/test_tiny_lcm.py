"""The shipped LCM-LoRA: 4 steps of one forward each, about as good as 20 with guidance, in ldmfast and diffusers."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

import ldmfast
from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import judge
from ldmfast.testing.scenes import sample_scenes

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "ldmfast" / "assets" / "tiny_lcm"
RECORD = json.loads((ROOT / "recipes" / "tiny_lcm" / "logs" / "evaluation.json").read_text())
FEW = {"solver": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
PROMPTS = ["a red circle above a blue square", "two orange diamonds on a mint background"]


@pytest.fixture(scope="module")
def few() -> ldmfast.Pipeline:
    return ldmfast.Pipeline.tiny("lcm")


def draw(pipe: ldmfast.Pipeline, prompts: list[str], **more) -> torch.Tensor:
    """(n, 3, 64, 64) in [-1, 1], one seed a prompt."""
    out = pipe(prompts, generator=list(range(len(prompts))), output_type="pt", progress=False, **more)
    return out.images.float() * 2 - 1


def floor(full: float, measured: int, count: int) -> float:
    """The measured share less four standard deviations of the difference of the two samples."""
    p = (full * measured + 1) / (measured + 2)
    return full - 4 * math.sqrt(p * (1 - p) * (1 / count + 1 / measured))


def test_held_out_captions_are_drawn_as_well_as_measured(few) -> None:
    scenes = sample_scenes(64, 31, "heldout")
    verdicts = judge(draw(few, [scene.caption for scene in scenes]), [expected_of(scene) for scene in scenes])
    rows = [{**v, "all correct": all(v.values())} for v in verdicts]
    for name in RECORD["counts"]:
        right = [row[name] for row in rows if name in row]
        limit = floor(RECORD["rows"]["LCM-LoRA, 4 steps"][name], RECORD["counts"][name], len(right))
        assert sum(right) / len(right) >= limit > 0.3, (name, sum(right), len(right), limit)


def test_the_record_is_within_three_points() -> None:
    rows = RECORD["rows"]
    assert rows["LCM-LoRA, 4 steps"]["mean"] >= rows["20 steps, guidance 3"]["mean"] - 0.03
    assert RECORD["captions"] == 512


def test_the_lora_is_what_makes_it(few) -> None:
    """Four steps of the network as it was: another picture, and the adapter is what differs."""
    base = ldmfast.Pipeline.tiny()
    plain, fused = draw(base, PROMPTS, **FEW), draw(few, PROMPTS)
    base.load_lora_weights(FOLDER, "lcm")
    side = draw(base, PROMPTS, **FEW)
    assert (side - fused).abs().max() < 1e-3  # beside the weights or in them
    assert (plain - fused).abs().max() > 0.1
    assert torch.equal(draw(base, PROMPTS, loras={}, **FEW), plain)


def test_pictures_are_those_of_diffusers() -> None:
    """The file read by diffusers' loader, its products added to diffusers' network by hand (which needs no peft), with
    LCMScheduler, 4 steps, guidance 1."""
    from diffusers import LCMScheduler, StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(FOLDER.parent / "tiny", torch_dtype=torch.float32)
    factors, alphas = StableDiffusionPipeline.lora_state_dict(FOLDER)
    assert not alphas and all(key.startswith("unet.") for key in factors)
    layers = {key.removesuffix(".lora_A.weight") for key in factors if "lora_A" in key}
    assert len(factors) == 2 * len(layers) > 200
    for layer in layers:
        weight = theirs.unet.get_submodule(layer.removeprefix("unet.")).weight
        up, down = (factors[f"{layer}.lora_{x}.weight"].float().flatten(1) for x in "BA")
        weight.data += (up @ down).view(weight.shape)
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    want = theirs(PROMPTS, num_inference_steps=4, guidance_scale=1.0, latents=noise, output_type="pt",
                  generator=torch.Generator().manual_seed(6)).images
    ours = ldmfast.Pipeline.tiny("lcm")
    got = ours(PROMPTS, latents=noise, output_type="pt", generator=torch.Generator().manual_seed(6),
               progress=False).images
    assert (got - want).abs().max() < 1e-3
    assert want.std() > 0.05


def test_defaults_are_four_forwards(few, monkeypatch) -> None:
    rows: list[int] = []
    forward = type(few.unet).forward
    monkeypatch.setattr(type(few.unet), "forward",
                        lambda self, x, *a, **k: rows.append(len(x)) or forward(self, x, *a, **k))
    assert torch.equal(draw(few, PROMPTS[:1]), draw(few, PROMPTS[:1], **FEW))
    assert sum(rows) == 2 * 4


def test_a_picture_repeats_from_its_settings(few, tmp_path) -> None:
    from ldmfast.pipelines import read_settings

    out = few(PROMPTS[0], generator=3, progress=False)
    out.save(tmp_path / "a.png")
    settings = read_settings(tmp_path / "a.png")
    again = few.repeat(settings, progress=False)
    assert out.images[0].tobytes() == again.images[0].tobytes()
    with pytest.raises(ldmfast.LdmfastError, match="fused"):
        ldmfast.Pipeline.tiny().repeat(settings, progress=False)


def test_file_is_small_and_is_the_one_that_was_exported() -> None:
    files = sorted(p for p in FOLDER.iterdir() if p.name != "SHA256SUMS")
    assert sum(p.stat().st_size for p in files) <= 2_000_000
    sums = dict(reversed(line.split("  ")) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files} == sums

"""The shipped diffusion transformer: the pictures of diffusers' pipeline, what its captions and classes say, and the
same in bf16 and int8.

The floors of the accuracy are the full measurement kept with the recipe (recipes/tiny_dit/logs/evaluation.json) less
four standard deviations of the difference of the two samples, as in test_tiny_quality.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import ldmfast
from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import judge, read
from ldmfast.testing.scenes import sample_scenes

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "ldmfast" / "assets" / "tiny_dit"
RECORD = json.loads((ROOT / "recipes" / "tiny_dit" / "logs" / "evaluation.json").read_text())
COUNT = 48


def draw(pipe: ldmfast.Pipeline, prompts: list[str], **more) -> torch.Tensor:
    """(n, 3, 64, 64) in [-1, 1], one null token, one seed a prompt."""
    out = pipe(prompts, generator=list(range(len(prompts))), max_sequence_length=1, output_type="pt", progress=False,
               **more)
    return out.images.float() * 2 - 1


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


def floor(full: float, measured: int, count: int) -> float:
    # one more right and one more wrong than seen: an estimate of exactly 0 or 1 keeps a variance
    p = (full * measured + 1) / (measured + 2)
    return full - 4 * math.sqrt(p * (1 - p) * (1 / count + 1 / measured))


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(COUNT, 31, "heldout")


@pytest.fixture(scope="module")
def pictures(scenes) -> torch.Tensor:
    return draw(ldmfast.Pipeline.tiny("dit"), [scene.caption for scene in scenes])


@pytest.mark.parametrize("texts", [
    {"prompt": "a red circle above a blue square on a mint background"},
    {"prompt": "", "prompt_2": "green ring"},
], ids=["caption", "class"])
def test_pictures_are_those_of_diffusers(texts) -> None:
    """The folder as it is, 20 Euler steps, guidance and the 256 null tokens that diffusers takes by default."""
    from diffusers import StableDiffusion3Pipeline

    theirs = StableDiffusion3Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32, text_encoder_3=None,
                                                      tokenizer_3=None)
    theirs.set_progress_bar_config(disable=True)
    ours = ldmfast.Pipeline.tiny("dit")
    assert ours.loaded.defaults["num_inference_steps"] == 20
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    scale = ours.loaded.defaults["guidance_scale"]
    want = theirs(**texts, num_inference_steps=20, guidance_scale=scale, latents=noise, output_type="pt").images
    got = ours(**texts, latents=noise, output_type="pt", progress=False).images
    assert (got - want).abs().max() < 1e-4
    assert want.std() > 0.05


def test_held_out_captions_are_drawn_as_well_as_measured(scenes, pictures) -> None:
    verdicts = judge(pictures, [expected_of(scene) for scene in scenes])
    rows = [{**v, "all correct": all(v.values())} for v in verdicts]
    for name in RECORD["counts"]:
        right = [row[name] for row in rows if name in row]
        limit = floor(RECORD["shipped"][name], RECORD["counts"][name], len(right))
        assert sum(right) / len(right) >= limit, (name, sum(right), len(right), limit)


def test_a_class_is_the_second_prompt_alone() -> None:
    """Judged by the class next to its own, none of these pictures would be right."""
    names = [f"{colour} {shape}" for colour, shape in zip(("red", "yellow", "cyan", "black", "purple", "green") * 4,
                                                         ("circle", "square", "cross", "ring") * 6)]
    images = draw(ldmfast.Pipeline.tiny("dit"), [""] * len(names), prompt_2=names)
    right = [bool(r.items) and {f"{i.colour} {i.shape}" for i in r.items} == {name}
             for r, name in zip(read(images), names)]
    full, measured = next(iter(RECORD["classes"].values())), RECORD["class pictures"]
    assert sum(right) / len(right) >= floor(full, measured, len(right)) > 0.2, right


@pytest.mark.parametrize(("precision", "least"), [("bf16", 40.0), ("int8", 33.0)])
def test_lower_precision_draws_the_same_pictures(scenes, pictures, precision, least) -> None:
    some = slice(0, 16)
    low = draw(ldmfast.Pipeline.tiny("dit", precision=precision), [scene.caption for scene in scenes[some]])
    found = psnr(low, pictures[some])
    assert found.median() >= least, found
    assert not torch.equal(low, pictures[some])


def test_unknown_network_is_refused() -> None:
    with pytest.raises(ldmfast.LdmfastError, match=r"'gan' does not ship.*unet, dit"):
        ldmfast.Pipeline.tiny("gan")


def test_folder_is_small_and_is_the_one_that_was_exported() -> None:
    import hashlib

    files = sorted(p for p in FOLDER.rglob("*") if p.is_file())
    assert sum(p.stat().st_size for p in files if not p.is_symlink()) <= 8_000_000
    sums = dict(reversed(line.split("  ")) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    found = {p.relative_to(FOLDER).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    found.pop("SHA256SUMS")
    assert found == sums

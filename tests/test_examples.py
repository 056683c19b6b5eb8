"""The examples run: ComfyUI's nodes called as ComfyUI calls them, and the photographs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ldmfast
from ldmfast.pipelines import read_settings

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def execute(node: type, **links: Any) -> tuple:
    """As ComfyUI's executor does: every input by name, widgets at their defaults, the method that FUNCTION names."""
    kinds = node.INPUT_TYPES()
    inputs = {}
    for group, must in (("required", True), ("optional", False)):
        for name, (kind, *options) in kinds.get(group, {}).items():
            if name in links:
                inputs[name] = links.pop(name)
            elif must or options:
                inputs[name] = options[0]["default"]
                if isinstance(kind, list):
                    assert inputs[name] in kind
                elif "min" in options[0]:
                    assert options[0]["min"] <= inputs[name] <= options[0]["max"]
    assert not links, "inputs that the node does not have"
    out = getattr(node(), node.FUNCTION)(**inputs)
    assert isinstance(out, tuple) and len(out) == len(node.RETURN_TYPES)
    return out


def test_comfyui_nodes(example, monkeypatch):
    assert "comfy" not in sys.modules
    nodes = example("comfyui_ldmfast").NODE_CLASS_MAPPINGS
    load, draw = nodes["LdmfastLoad"], nodes["LdmfastDraw"]
    (pipe,) = execute(load, precision="exact")
    call = {"pipeline": pipe, "positive": "a (red:1.2) circle", "steps": 3, "seed": 5}
    (image,) = execute(draw, **call, batch_size=2)
    assert image.shape == (2, 64, 64, 3) and image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1
    direct = {"num_inference_steps": 3, "guidance_scale": 4.0, "solver": "dpmpp_2m", "prompt_weighting": True,
              "output_type": "np", "progress": False}
    expected = pipe("a (red:1.2) circle", num_images_per_prompt=2, generator=5, **direct).images
    assert np.array_equal(image.numpy(), expected)

    picture = torch.rand(1, 72, 64, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 72, 64)
    mask[:, 16:48, 16:48] = 1
    (redrawn,) = execute(draw, **call, image=picture, mask=mask, denoise=1.0)
    expected = pipe("a (red:1.2) circle", image=picture[0].numpy(), mask_image=mask[0].numpy(), strength=1.0,
                    generator=5, **direct).images
    assert redrawn.shape == (1, 72, 64, 3) and np.array_equal(redrawn.numpy(), expected)


def test_comfyui_progress_and_cancel(example, monkeypatch):
    """With ComfyUI's modules there, its bar moves once a step and its exception ends the call."""
    moved: list[int] = []

    class Interrupted(Exception):
        pass

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update(self, by: int) -> None:
            moved.append(by)

    def throw() -> None:
        if len(moved) == 2:
            raise Interrupted

    comfy, management, utils = (ModuleType(n) for n in ("comfy", "comfy.model_management", "comfy.utils"))
    management.throw_exception_if_processing_interrupted, utils.ProgressBar = throw, ProgressBar
    for module in (comfy, management, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    draw = example("comfyui_ldmfast").LdmfastDraw
    with pytest.raises(Interrupted):
        execute(draw, pipeline=ldmfast.Pipeline.tiny(), steps=4)
    assert moved == [1, 1]


@pytest.mark.parametrize("name, results", [
    ("img2img_photo", ["china-0.1.png", "china-0.3.png", "china-0.6.png"]), ("inpaint_photo", ["china.png"])])
def test_photographs(name, results, example, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the photographs are scikit-learn's, which is not installed")
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "out"), "--precision", "exact"])
    example(name).main()
    photo = example("photographs").photographs(64, square=True)["china"]
    made = [np.asarray(Image.open(tmp_path / "out" / file), dtype=float) for file in results]
    assert read_settings(tmp_path / "out" / results[0])["mode"] == ("inpaint" if name == "inpaint_photo" else "img2img")
    away = [np.abs(picture - np.asarray(photo)).mean() for picture in made]
    assert away == sorted(away) and away[0] > 0, "the stronger, the farther from the photograph"
    sheet = np.asarray(Image.open(tmp_path / "out" / "china-sheet.png"))
    assert sheet.shape == (64, 256, 3) and np.array_equal(sheet[:, :64], np.asarray(photo))
    if name == "inpaint_photo":
        pasted, mask = sheet[:, 192:], sheet[:, 64:128] > 0
        assert np.array_equal(pasted[~mask], np.asarray(photo)[~mask]) and (pasted != np.asarray(photo))[mask].any()
    assert (tmp_path / "out" / "flower-sheet.png").exists()


@pytest.mark.parametrize("name, arguments", [
    ("joint_features", ["--steps", "2"]), ("multi_stage", ["--steps", "2", "--stages", "3"]),
    ("interpolants", ["--steps", "100", "--diffusion", "1.0"])])
def test_samplers(example, monkeypatch, capsys, name: str, arguments: list[str]) -> None:
    """They run; the interpolant's ends have the width that its laws have."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    example(name).main()
    lines = capsys.readouterr().out.splitlines()
    if name == "interpolants":
        assert len(lines) == 2 and all(abs(float(line.split(": ")[1].split()[0]) - 0.2) < 0.03 for line in lines)
    else:
        assert lines and all(0.1 < float(line.rsplit(maxsplit=1)[1]) < 10 for line in lines)

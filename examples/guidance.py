"""The shipped model with each guidance: a contact sheet, what it costs in forwards, and how often the judge agrees.

    python examples/guidance.py                                 # writes guidance.png, scores 24 held-out captions
    python examples/guidance.py --out sheet.png --captions 100
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from PIL import Image, ImageDraw

import ldmfast
from ldmfast.guidance import APG, CFG, PAG, SAG, SEG, CFGZero, Compose, Energy, Minority, SkipLayer, TangentialCFG
from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import judge
from ldmfast.testing.scenes import sample_scenes

PROMPTS = ["a red circle above a blue square", "three green triangles", "a small yellow ring left of a large red cross",
           "a blue square on a white background", "a large green ring", "two small red circles"]
SIDE, LINE = 96, 16


def bright(picture: torch.Tensor) -> torch.Tensor:
    """An energy that is low for large latents of the first channel."""
    return -picture[:, 0].flatten(1).mean(1)


ROWS: dict[str, Any] = {
    "none": CFG(scale=1.0),
    "CFG": CFG(),
    "CFG, noise levels 0.2 to 5": CFG(sigmas=(0.2, 5.0)),
    "CFG, cosine": CFG(schedule="cosine"),
    "CFG, rescale 0.7": CFG(rescale=0.7),
    "CFG-Zero*": CFGZero(),
    "APG, momentum -0.5, eta 0": APG(momentum=-0.5, eta=0.0),
    "tangential CFG": TangentialCFG(),
    "CFG and PAG": PAG(scale=1.0),
    "CFG and SEG": SEG(scale=1.0),
    "CFG and SAG": SAG(),
    "CFG and skip-layer": SkipLayer(layers=(3,), scale=1.0, stop=0.5),
    "CFG and 'a white background'": Compose(prompts=["a white background"], scales=[2.0]),
    "CFG and an energy": Energy(energy=bright, scale=2.0, start=0.2),
    "CFG and rare pictures": Minority(scale=0.02, every=2),
}


def count(pipe: ldmfast.Pipeline, call: dict[str, Any]) -> tuple[Any, int]:
    """A call's pictures, and the rows that went through the network."""
    rows: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])),
                                                 with_kwargs=True)
    try:
        return pipe(**call), sum(rows)
    finally:
        handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="guidance.png")
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    pipe = ldmfast.Pipeline.tiny()
    scenes = sample_scenes(options.captions, 31, "heldout") if options.captions else []
    sheet = Image.new("RGB", (SIDE * len(PROMPTS), (SIDE + LINE) * len(ROWS)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, guidance) in enumerate(ROWS.items()):
        call = {"num_inference_steps": options.steps, "generator": 0, "progress": False, "guidance": guidance}
        out, rows = count(pipe, call | {"prompt": PROMPTS})
        words = f"{name}: {rows / len(PROMPTS):g} forwards"
        if scenes:
            start = time.perf_counter()
            drawn = pipe([s.caption for s in scenes], output_type="pt", **call).images * 2 - 1
            seconds = (time.perf_counter() - start) / len(scenes)
            right = [ok for verdict in judge(drawn, [expected_of(s) for s in scenes]) for ok in verdict.values()]
            words += f", {100 * sum(right) / len(right):.1f}% of attributes"
            print(f"{words}, {seconds * 1e3:.0f} ms a picture", flush=True)
        pen.text((2, row * (SIDE + LINE) + 2), words, fill="black")
        for column, image in enumerate(out.images):
            sheet.paste(image.resize((SIDE, SIDE)), (column * SIDE, row * (SIDE + LINE) + LINE))
    sheet.save(options.out)


if __name__ == "__main__":
    main()

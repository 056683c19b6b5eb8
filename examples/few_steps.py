"""The shipped model at 20 steps with guidance beside its LCM-LoRA at 8, 4, 2 and 1: time and a contact sheet.

    python examples/few_steps.py                   # writes few_steps.png
    python examples/few_steps.py --out sheet.png --prompts "a red circle" "two blue squares"
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from PIL import Image, ImageDraw

import ldmfast

PROMPTS = ["a red circle above a blue square", "three green triangles", "a small yellow ring left of a large red cross",
           "a blue square on a white background", "a large green ring", "two small red circles"]
SIDE, LINE = 96, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="few_steps.png")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    options = parser.parse_args()
    exact, few = ldmfast.Pipeline.tiny(), ldmfast.Pipeline.tiny("lcm")
    rows = [("20 steps, guidance 3: 40 forwards", exact, 20)]
    rows += [(f"LCM-LoRA, {n} step{'s'[:n > 1]}: {n} forward{'s'[:n > 1]}", few, n) for n in (8, 4, 2, 1)]
    for pipe in (exact, few):
        pipe(options.prompts, progress=False)  # the first call is slower
    sheet = Image.new("RGB", (SIDE * len(options.prompts), (SIDE + LINE) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, pipe, steps) in enumerate(rows):
        start = time.perf_counter()
        out = pipe(options.prompts, num_inference_steps=steps, generator=0, output_type="np", progress=False)
        seconds, top = time.perf_counter() - start, row * (SIDE + LINE)
        print(f"{name} ({seconds / len(options.prompts) * 1e3:.0f} ms a picture)")
        pen.text((2, top + 2), name, fill="black")
        for column, image in enumerate(out.images):
            picture = Image.fromarray((image * 255).round().astype(np.uint8)).resize((SIDE, SIDE))
            sheet.paste(picture, (column * SIDE, top + LINE))
    sheet.save(options.out)


if __name__ == "__main__":
    main()

"""The shipped model with each cache beside the exact pictures: time, PSNR and a contact sheet.

    python examples/caches.py                   # writes caches.png
    python examples/caches.py --out sheet.png --prompts "a red circle" "two blue squares"
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from PIL import Image, ImageDraw

import ldmfast
from ldmfast.caches import FORA, DeepCache, EasyCache, FirstBlock, Policy, TaylorSeer, TGate

PROMPTS = ["a red circle above a blue square", "three green triangles", "a small yellow ring left of a large red cross",
           "a blue square on a white background", "a large green ring", "two small red circles"]
ROWS: dict[str, Policy | list[Policy] | None] = {
    "exact": None,
    "DeepCache, interval 3": DeepCache(interval=3),
    "FORA, interval 3": FORA(interval=3),
    "FirstBlock, threshold 0.3": FirstBlock(threshold=0.3),
    "EasyCache, threshold 0.5": EasyCache(threshold=0.5),
    "TaylorSeer of the output, interval 3": TaylorSeer(interval=3, on="output"),
    "TaylorSeer of the output, interval 5": TaylorSeer(interval=5, on="output"),
    "TaylorSeer, interval 4, and T-GATE after 8": [TaylorSeer(interval=4, on="output"), TGate(gate=8)],
}
SIDE, LINE = 96, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="caches.png")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    options = parser.parse_args()
    pipe = ldmfast.Pipeline.tiny()
    pipe(options.prompts, progress=False)  # the first call is slower
    sheet = Image.new("RGB", (SIDE * len(options.prompts), (SIDE + LINE) * len(ROWS)), "white")
    pen, exact = ImageDraw.Draw(sheet), np.empty(0)
    for row, (name, cache) in enumerate(ROWS.items()):
        start = time.perf_counter()
        out = pipe(options.prompts, generator=0, output_type="np", progress=False, cache=cache)
        seconds, top = time.perf_counter() - start, row * (SIDE + LINE)
        words = name
        if cache is None:
            exact = out.images
        else:
            psnr = -10 * np.log10(np.square(out.images - exact).mean(axis=(1, 2, 3)))
            held = out.report.bytes / 1024 / len(out.images)
            words += f": {psnr.mean():.1f} dB from exact, held {held:.0f} kB a picture"
        print(f"{words} ({seconds / len(options.prompts) * 1e3:.0f} ms a picture)")
        pen.text((2, top + 2), words, fill="black")
        for column, image in enumerate(out.images):
            picture = Image.fromarray((image * 255).round().astype(np.uint8)).resize((SIDE, SIDE))
            sheet.paste(picture, (column * SIDE, top + LINE))
    sheet.save(options.out)


if __name__ == "__main__":
    main()

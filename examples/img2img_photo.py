"""Image to image on two photographs: the same picture redrawn a little, half, and nearly whole.

    python examples/img2img_photo.py OUT                                  # with the shipped model
    python examples/img2img_photo.py OUT --model FOLDER --prompt "an oil painting" --height 512

OUT is a folder for the results: PHOTO-STRENGTH.png, each with the settings that made it, and PHOTO-sheet.png with the
photograph and the results side by side. --model takes a diffusers folder or a single file. The shipped model knows
coloured shapes alone: it keeps where things are, and turns what it draws again into shapes and plain colours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from photographs import photographs, sheet

import ldmfast


def load(model: str | None, precision: str) -> ldmfast.Pipeline:
    if model is None:
        return ldmfast.Pipeline.tiny(precision=precision)
    if Path(model).is_dir():
        return ldmfast.Pipeline.from_pretrained(model, precision=precision)
    return ldmfast.Pipeline.from_single_file(model, precision=precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--model", help="diffusers folder or single file (default: the shipped model)")
    parser.add_argument("--prompt", default="a yellow circle on a gray background")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.1, 0.3, 0.6])
    parser.add_argument("--height", type=int, default=64, help="pixels of the photographs (default %(default)s)")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load(args.model, args.precision)
    for name, photo in photographs(args.height, square=args.model is None).items():
        row = [photo]
        for strength in args.strengths:
            out = pipe(args.prompt, image=photo, strength=strength, generator=0, progress=False)
            out.save(args.out / f"{name}-{strength:g}.png")
            row += out.images
        sheet(row).save(args.out / f"{name}-sheet.png")
        print(f"{name}: {photo.width}x{photo.height}, strengths {args.strengths}: {args.out / name}-sheet.png")


if __name__ == "__main__":
    main()

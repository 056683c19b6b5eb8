"""Inpainting on two photographs: what lies under an ellipse in the middle is drawn anew, the rest stays.

    python examples/inpaint_photo.py OUT                                  # with the shipped model
    python examples/inpaint_photo.py OUT --model FOLDER --prompt "a hot-air balloon" --height 512

OUT is a folder for the results: PHOTO.png with the settings that made it, and PHOTO-sheet.png with the photograph, the
mask, the model's picture, and that picture pasted into the photograph. Pasting is usually wanted: outside the mask a
latent diffusion model gives the photograph as its autoencoder sees it, and the shipped one, which was trained on
coloured shapes, sees little of a photograph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from img2img_photo import load
from photographs import photographs, sheet
from PIL import Image, ImageDraw


def ellipse(size: tuple[int, int]) -> Image.Image:
    """A mask (white: draw anew) over the middle third."""
    width, height = size
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((width // 3, height // 4, 2 * width // 3, 3 * height // 4), fill=255)
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--model", help="diffusers folder or single file (default: the shipped model)")
    parser.add_argument("--prompt", default="a red circle on a white background")
    parser.add_argument("--height", type=int, default=64, help="pixels of the photographs (default %(default)s)")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = load(args.model, args.precision)
    for name, photo in photographs(args.height, square=args.model is None).items():
        mask = ellipse(photo.size)
        out = pipe(args.prompt, image=photo, mask_image=mask, generator=0, progress=False)
        out.save(args.out / f"{name}.png")
        pasted = Image.composite(out.images[0], photo, mask)
        sheet([photo, mask.convert("RGB"), out.images[0], pasted]).save(args.out / f"{name}-sheet.png")
        print(f"{name}: {photo.width}x{photo.height}: {args.out / name}-sheet.png")


if __name__ == "__main__":
    main()

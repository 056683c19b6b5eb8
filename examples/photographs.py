"""The two photographs that scikit-learn carries, and a sheet of pictures side by side: used by the other examples."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def photographs(height: int) -> dict[str, Image.Image]:
    """name -> photograph, scaled to ``height`` pixels and cut to multiples of 8 (pip install scikit-learn)."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise SystemExit("this example takes its photographs from scikit-learn: pip install scikit-learn") from error
    found = load_sample_images()
    pictures = {}
    for name, pixels in zip(found.filenames, found.images):
        photo = Image.fromarray(pixels)
        width = round(photo.width * height / photo.height)
        photo = photo.resize((width, height), Image.Resampling.LANCZOS)
        pictures[name.rsplit("/", 1)[-1].split(".")[0]] = photo.crop((0, 0, width // 8 * 8, height // 8 * 8))
    return pictures


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row."""
    width, height = pictures[0].size
    whole = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i * width, 0))
    return whole

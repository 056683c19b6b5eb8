"""The two photographs that scikit-learn carries, and a sheet of pictures side by side: used by the other examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps


def photographs(height: int, square: bool) -> dict[str, Image.Image]:
    """name -> photograph of ``height`` pixels, its middle square or all of it (pip install scikit-learn)."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise SystemExit("this example takes its photographs from scikit-learn: pip install scikit-learn") from error
    found = load_sample_images()
    pictures = {}
    for name, pixels in zip(found.filenames, found.images):
        photo = Image.fromarray(pixels)
        width = height if square else photo.width * height // photo.height // 8 * 8
        pictures[Path(name).stem] = ImageOps.fit(photo, (width, height), Image.Resampling.LANCZOS)
    return pictures


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row."""
    width, height = pictures[0].size
    whole = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i * width, 0))
    return whole

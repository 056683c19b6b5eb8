"""What a pipeline returns, and PNG files that carry the settings which made them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from ..caches import CacheReport
from ..errors import LdmfastError
from ..torch_modes import ordinary

_KEY = "ldmfast"


@dataclass
class PipelineOutput:
    """Result of a pipeline call.

    images: list of PIL pictures, an (N, H, W, 3) float array in [0, 1], an (N, 3, H, W) tensor in [0, 1], or
        latents (N, C, h, w), as ``output_type`` asked.
    settings: one dictionary a picture; :func:`save_png` writes it into the file.
    report: what the call's cache did, None without one.
    cancelled: True when the callback ended the call early; the pictures then show the state reached.
    """

    images: Any
    settings: list[dict[str, Any]] = field(default_factory=list)
    cancelled: bool = False
    nsfw_content_detected: None = None
    report: CacheReport | None = None

    def __getitem__(self, index: int) -> Any:
        return (self.images, self.nsfw_content_detected)[index]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write every picture as PNG with its settings. More than one picture: ``name-0.png``, ``name-1.png``."""
        if not isinstance(self.images, list):
            raise LdmfastError("only output_type='pil' pictures can be saved as PNG: call the pipeline with it")
        target = Path(path)
        if len(self.images) == 1:
            names = [target]
        else:
            names = [target.with_name(f"{target.stem}-{i}{target.suffix}") for i in range(len(self.images))]
        for name, image, settings in zip(names, self.images, self.settings):
            save_png(image, name, settings)
        return names


def to_output(pixels: torch.Tensor, output_type: str) -> Any:
    """(N, 3, H, W) in [-1, 1] to what ``output_type`` names: "pil", "np" or "pt"."""
    unit = (pixels.float() * 0.5 + 0.5).clamp_(0, 1)
    if output_type == "pt":
        return ordinary(unit)
    array = unit.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(a) for a in np.rint(array * 255).astype(np.uint8)]


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch, and ranges, as JSON knows them."""
    return value.tolist() if hasattr(value, "tolist") else list(value)


def save_png(image: Image.Image, path: str | os.PathLike[str], settings: dict[str, Any] | None = None) -> None:
    """Write a PNG through a temporary name, with ``settings`` as JSON in its text chunk."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise LdmfastError(f"output name {target.name!r} does not end in .png: the settings are kept in PNG metadata")
    if not target.parent.is_dir():
        raise LdmfastError(f"folder {target.parent} does not exist: create it or choose another output name")
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(_KEY, json.dumps(settings, sort_keys=True, ensure_ascii=False, default=_plain))
    try:
        with replacing(target) as file:
            image.save(file, format="PNG", pnginfo=info)
    except OSError as error:
        raise LdmfastError(f"{target}: cannot be written ({error.strerror or error}); give another path") from error


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file to write to under a temporary name beside ``target``, which it becomes when it is whole."""
    # not tempfile's: such a file is its owner's alone, and what it should be cannot be asked without setting the
    # umask, which is the whole process's: two threads that do so at once may leave it at 0
    temporary = target.with_name(f"{secrets.token_hex(8)}{target.suffix}.part")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that :func:`save_png` wrote. Raises LdmfastError when the file has none or is no PNG."""
    if not Path(path).is_file():
        raise LdmfastError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            text = image.info.get(_KEY) if image.format == "PNG" else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL says of broken files
        raise LdmfastError(f"{path}: not a readable picture ({error})") from error
    if text is None:
        raise LdmfastError(f"{path}: carries no ldmfast settings; only PNGs written by ldmfast do")
    try:
        settings = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise LdmfastError(f"{path}: its ldmfast settings are damaged ({error})") from error
    if not isinstance(settings, dict):
        raise LdmfastError(f"{path}: its ldmfast settings are damaged (not a table)")
    return settings

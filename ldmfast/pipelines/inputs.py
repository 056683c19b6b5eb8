"""Call arguments to tensors: seeds and noise, pictures and masks, sizes. Everything is checked before heavy work."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import LdmfastError, ShapeError

LARGEST = 2**24  # pixels a side; more, and sizes in bytes leave 64 bits before memory runs out
_FARTHEST = 2.0  # of a picture's numbers; beyond it they are counted to 255 and not to 1
MOST = 2**16  # pictures: each has a generator of 5 KB
GeneratorLike = torch.Generator | int | Sequence[torch.Generator | int] | None


@dataclass(frozen=True)
class RandomSource:
    """Where a call's random numbers come from.

    Either one generator a picture (a picture then does not depend on its batch), or, as in diffusers, one
    ``torch.Generator`` from which the whole batch is drawn. ``seeds`` are None where the caller's generator was
    already in use, because its state cannot be told by a number.
    """

    generators: tuple[torch.Generator, ...]
    joint: bool
    seeds: tuple[int | None, ...]

    @property
    def argument(self) -> torch.Generator | list[torch.Generator]:
        """In the form that samplers take."""
        return self.generators[0] if self.joint else list(self.generators)

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """fp32 normal numbers of ``shape`` (batch first), drawn on the generators' own device."""
        if self.joint:
            g = self.generators[0]
            return torch.randn(tuple(shape), generator=g, device=g.device, dtype=torch.float32)
        rows = [torch.randn((1, *shape[1:]), generator=g, device=g.device, dtype=torch.float32)
                for g in self.generators]
        return torch.cat(rows) if rows else torch.empty(tuple(shape), dtype=torch.float32)

    def states(self) -> list[torch.Tensor]:
        return [g.get_state() for g in self.generators]

    def restore(self, states: list[torch.Tensor]) -> None:
        for g, state in zip(self.generators, states):
            g.set_state(state)


def _seeded(seed: int) -> torch.Generator:
    if not -(2**63) <= seed < 2**64:
        raise LdmfastError(f"seed {seed} is out of range: choose one from 0 to 2**64 - 1")
    return torch.Generator().manual_seed(seed)


def _seed_of(generator: torch.Generator) -> int | None:
    seed = generator.initial_seed()
    if generator.device.type != "cpu":
        return None
    fresh = torch.Generator().manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None


def random_source(generator: GeneratorLike, pictures: int) -> RandomSource:
    """An int seeds picture i with ``generator + i``; None draws that int from torch's global generator."""
    if pictures > MOST:
        raise ShapeError(f"{pictures} pictures in one call: ask for {MOST} at most, and call several times")
    if generator is None:
        generator = int(torch.randint(2**48, (), device="cpu"))
    if isinstance(generator, torch.Generator):
        seed = _seed_of(generator) if pictures == 1 else None
        return RandomSource((generator,), True, (seed,) * pictures)
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
        seeds = [int(generator) + i for i in range(pictures)]
        return RandomSource(tuple(_seeded(s) for s in seeds), False, tuple(seeds))
    if not isinstance(generator, (list, tuple)):
        raise LdmfastError(f"generator is a {type(generator).__name__}: "
                           "give an int, a torch.Generator or a list of these")
    if len(generator) != pictures:
        raise ShapeError(f"{len(generator)} generators were given for {pictures} pictures: give one for each")
    items, numbers = [], []
    for g in generator:
        if isinstance(g, torch.Generator):
            items.append(g)
            numbers.append(_seed_of(g))
        elif isinstance(g, (int, np.integer)) and not isinstance(g, bool):
            items.append(_seeded(int(g)))
            numbers.append(int(g))
        else:
            raise LdmfastError(f"generator holds a {type(g).__name__}: give ints or torch.Generators")
    return RandomSource(tuple(items), False, tuple(numbers))


def check_lists(a: dict[str, Any], names: Sequence[str] = ("timesteps", "sigmas")) -> None:
    """Makes lists of floats of these arguments where they are given. Raises LdmfastError for anything else."""
    for name in names:
        value = a.get(name)
        if value is None:
            continue
        try:
            a[name] = [float(v) for v in value]
        except (TypeError, ValueError, OverflowError) as error:
            raise LdmfastError(f"{name}={shown(value)} is not a list of numbers") from error


def check_callback(callback: Any, names: Any) -> None:
    """callback_on_step_end, and diffusers' callback_on_step_end_tensor_inputs. Raises LdmfastError for what cannot be
    called, and unless the latents alone are named."""
    if callback is not None and not callable(callback):
        raise LdmfastError(f"callback_on_step_end is a {type(callback).__name__}: give a function of (call, step, "
                           "timestep, tensors)")
    if not isinstance(names, (list, tuple)) or list(names) != ["latents"]:
        raise LdmfastError("callback_on_step_end_tensor_inputs: only ['latents'] is offered")


def shown(value: Any) -> str:
    """A value in a message of one line."""
    return " ".join(repr(value).split())[:80]


def check_size(height: int, width: int, multiple: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ShapeError(f"{name}={shown(value)} is not a whole number of pixels")
        if value > LARGEST:
            raise ShapeError(f"{name}={value} is beyond any memory: use {LARGEST} pixels at most")
        if value < multiple or value % multiple:
            low = max(multiple, value // multiple * multiple)
            choice = f"{low}" if value < multiple else f"{low} or {low + multiple}"
            raise ShapeError(f"{name}={value} is not a positive multiple of {multiple}: use {choice}")


def _check_image(image: Any, what: str) -> None:
    """Raises ShapeError for what has no pixels or is no picture, LdmfastError for what is no numbers."""
    pil = isinstance(image, Image.Image)
    shape = (*image.size[::-1], 3) if pil else tuple(image.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ShapeError(f"{what} has shape {shape}: give height and width, and 1 or 3 channels, none of them 0")
    if isinstance(image, np.ndarray) and image.dtype.kind not in "fiub":
        raise LdmfastError(f"{what} is an array of {image.dtype}: give uint8, or floating numbers in [0, 1]")
    if isinstance(image, torch.Tensor) and (image.is_complex() or image.is_meta or image.layout != torch.strided):
        raise LdmfastError(f"{what} is a {image.dtype} tensor on {image.device}, {image.layout}: give real numbers in "
                           "memory")


def _one_image(image: Any, what: str) -> torch.Tensor:
    """PIL, (H, W, C) array in [0, 1] or uint8, or (C, H, W) tensor -> (C, H, W) float, not yet normalised."""
    if isinstance(image, (Image.Image, np.ndarray, torch.Tensor)):
        _check_image(image, what)
    if isinstance(image, Image.Image):
        array = np.asarray(image.convert("L" if what == "mask_image" else "RGB"), dtype=np.float32) / 255
        return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        array = image.astype(np.float32)
        if image.dtype == np.uint8:
            array /= 255
        return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
    if isinstance(image, torch.Tensor):
        tensor = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        return tensor if tensor.ndim == 3 else tensor[None]
    raise LdmfastError(f"{what} is a {type(image).__name__}: "
                       "give a PIL image, a numpy array, a tensor or a list of these")


def _as_list(image: Any) -> list[Any]:
    if isinstance(image, (list, tuple)):
        if not image:
            raise ShapeError("an empty list of pictures was given: give at least one")
        return list(image)
    if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
        return list(image)
    return [image]


def image_size(image: Any, multiple: int) -> tuple[int, int]:
    """(height, width) of the first picture, rounded down to ``multiple``."""
    first = _as_list(image)[0]
    if isinstance(first, Image.Image):
        _check_image(first, "image")
        width, height = first.size
    else:
        height, width = _one_image(first, "image").shape[-2:]
    return max(multiple, height // multiple * multiple), max(multiple, width // multiple * multiple)


def _resized(image: Any, height: int, width: int, what: str) -> torch.Tensor:
    if isinstance(image, Image.Image) and image.size != (width, height):
        _check_image(image, what)
        image = image.convert("L" if what == "mask_image" else "RGB")
        image = image.resize((width, height), resample=Image.Resampling.LANCZOS)
    tensor = _one_image(image, what)
    if what == "image" and (top := float(tensor.abs().max())) > _FARTHEST:
        raise LdmfastError(f"image reaches {top:g}: give uint8, or numbers in [0, 1]")
    if tuple(tensor.shape[-2:]) != (height, width):
        tensor = torch.nn.functional.interpolate(tensor[None], size=(height, width))[0]
    if not bool(torch.isfinite(tensor).all()):
        raise LdmfastError(f"{what} holds NaN or infinite values: check how it was read")
    return tensor


def prepare_image(image: Any, height: int, width: int) -> torch.Tensor:
    """Pictures to (N, 3, height, width) fp32 in [-1, 1]. Values in [0, 1] are expected; tensors that reach below 0
    are taken as already in [-1, 1]."""
    rows = []
    for item in _as_list(image):
        x = _resized(item, height, width, "image")
        if x.shape[0] == 1:
            x = x.expand(3, -1, -1)
        if x.shape[0] != 3:
            raise ShapeError(f"image has {x.shape[0]} channels: give 3 (RGB) or 1")
        rows.append(x if isinstance(item, torch.Tensor) and bool((x < 0).any()) else x * 2 - 1)
    return torch.stack(rows)


def prepare_mask(mask: Any, height: int, width: int) -> torch.Tensor:
    """Masks to (N, 1, height, width) fp32 of exactly 0 (keep) and 1 (repaint); the threshold is 0.5."""
    rows = []
    for item in _as_list(mask):
        m = _resized(item, height, width, "mask_image")
        if m.shape[0] != 1:
            m = m.mean(0, keepdim=True)
        rows.append((m >= 0.5).float())
    return torch.stack(rows)


def repeat_to(x: torch.Tensor, pictures: int, what: str) -> torch.Tensor:
    """(n, ...) to (pictures, ...), each row repeated in turn as diffusers does."""
    if x.shape[0] == pictures:
        return x
    if x.shape[0] == 0 or pictures % x.shape[0]:
        raise ShapeError(f"{x.shape[0]} {what} were given for {pictures} pictures: give 1 or {pictures}")
    return x.repeat(pictures // x.shape[0], *[1] * (x.ndim - 1))


def whole(name: str, value: Any, least: int) -> int:
    try:
        found = least - 1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except (TypeError, ValueError):  # arrays have __index__, and raise in it
        found = least - 1
    if found < least:
        raise LdmfastError(f"{name}={shown(value)} is not a whole number of at least {least}")
    return found


def pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise LdmfastError(f"{name}={shown(value)} is not a pair of whole numbers, height or top first")
    first, second = (whole(name, v, 0) for v in value)
    return first, second


def number(name: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or (found < 0 and name != "guidance_scale"):
        least = "" if name == "guidance_scale" else " >= 0"
        raise LdmfastError(f"{name}={shown(value)} is not a finite number{least}")
    return found


def texts_of(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise LdmfastError(f"{name} is a {type(value).__name__}: give a text or a list of texts")
    if not texts:
        raise ShapeError(f"{name} is an empty list: give at least one text")
    for text in texts:
        if broken := [c for c in text if "\ud800" <= c <= "\udfff"]:
            raise LdmfastError(f"{name} holds {broken[0]!r}, half a character: the text was read in a wrong encoding")
    return list(texts)

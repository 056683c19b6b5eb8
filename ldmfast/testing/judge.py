"""Reads a scene back from its pixels and compares it with what a caption asks for.

Nearest palette colours give background and objects; connected components separate the objects; the
soft coverage of each is compared with the analytic template of every shape (best overlap wins).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmfast.testing.captions import Expected
from ldmfast.testing.scenes import (
    BACKGROUND_COLOURS,
    OBJECT_COLOURS,
    SHAPES,
    SIZE,
    palette,
    signed_distance,
)

# A component smaller than this is not an object: half of the area of the smallest one drawn, a
# ring or cross of radius 7.5 (about 95 pixels).
MIN_AREA = 45
# Halfway between the radii of "small" (at most 8.5) and "large" (at least 12.5).
SIZE_LIMIT = 10.5
# Two objects whose centres are nearer than this along both axes have no readable relation.
MIN_OFFSET = 4.0


@dataclass(frozen=True)
class Found:
    """One object read from the picture; centre and radius in pixels, overlap in [0, 1]."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What the picture shows: objects, the largest first, and the background (top, bottom)."""

    items: tuple[Found, ...]
    background: tuple[str, str]


def read(images: Tensor) -> list[Reading]:
    """Reads pictures (n, 3, 64, 64) in [-1, 1]. Raises ValueError for another shape."""
    if images.dim() != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"pictures have shape {tuple(images.shape)}, the judge reads (n, 3, {SIZE}, {SIZE})")
    images = images.detach().float().clamp(-1, 1)
    return [reading for chunk in images.split(128) for reading in _read(chunk)]


def _read(images: Tensor) -> list[Reading]:
    objects, grounds = list(OBJECT_COLOURS), list(BACKGROUND_COLOURS)
    colours = palette([*objects, *grounds])
    pixels = images.permute(0, 2, 3, 1)
    nearest = (pixels[..., None, :] - colours).square().sum(-1).argmin(-1)  # (n, 64, 64)
    halves = nearest.unflatten(1, (2, SIZE // 2)).flatten(2)  # (n, 2, 2048)
    votes = torch.stack([(halves == len(objects) + k).sum(2) for k in range(len(grounds))], 2)
    ground = votes.argmax(2)  # (n, 2)
    labels = _components(nearest < len(objects))
    readings = []
    for i in range(len(images)):
        names = (grounds[int(ground[i, 0])], grounds[int(ground[i, 1])])
        back = palette(names).repeat_interleave(SIZE // 2, 0)[:, None].expand(SIZE, SIZE, 3)
        items = []
        for label, area in zip(*labels[i].unique(return_counts=True)):
            if label > 0 and area >= MIN_AREA:
                mask = labels[i] == label
                colour = int(nearest[i][mask].bincount(minlength=len(objects)).argmax())
                items.append(_classify(pixels[i], mask, back, colours[colour], objects[colour]))
        readings.append(Reading(tuple(sorted(items, key=lambda item: -item.radius)), names))
    return readings


def _components(mask: Tensor) -> Tensor:
    """Labels > 0 of the 8-connected components of (n, h, w) masks, 0 outside."""
    h, w = mask.shape[1:]
    labels = (torch.arange(1, h * w + 1, dtype=torch.float32).view(1, h, w) * mask).unsqueeze(1)
    while True:
        grown = F.max_pool2d(labels, 3, 1, 1) * mask.unsqueeze(1)
        if torch.equal(grown, labels):
            return labels.squeeze(1).long()
        labels = grown


def _classify(pixels: Tensor, mask: Tensor, back: Tensor, colour: Tensor, name: str) -> Found:
    """Shape, centre and radius of one component: the template with the largest overlap."""
    towards = colour - back
    cover = ((pixels - back) * towards).sum(-1) / towards.square().sum(-1)
    near = F.max_pool2d(mask.float()[None, None], 5, 1, 2)[0, 0]  # the blurred edge belongs to it
    cover = cover.clamp(0, 1) * near
    total = float(cover.sum())
    grid = torch.arange(SIZE) + 0.5
    x, y = float((cover.sum(0) * grid).sum()) / total, float((cover.sum(1) * grid).sum()) / total
    best = Found(name, SHAPES[0], x, y, 0.0, -1.0)
    for shape, (area, shift) in _UNIT.items():
        radius = (total / area) ** 0.5
        dx, dy = (grid - x)[None, :], (grid - (y - shift * radius))[:, None]
        dx, dy = torch.broadcast_tensors(dx, dy)
        template = (0.5 - signed_distance(shape, dx, dy, torch.tensor(radius))).clamp(0, 1)
        overlap = float(torch.minimum(cover, template).sum() / torch.maximum(cover, template).sum())
        if overlap > best.overlap:
            best = Found(name, shape, x, y - shift * radius, radius, overlap)
    return best


def _unit_moments(shape: str) -> tuple[float, float]:
    """(area, centroid below the nominal centre) of a shape of radius 1, measured at radius 100."""
    grid = torch.arange(-130, 130) + 0.5
    dx, dy = torch.broadcast_tensors(grid[None, :], grid[:, None])
    cover = (0.5 - signed_distance(shape, dx, dy, torch.tensor(100.0))).clamp(0, 1)
    area = float(cover.sum())
    return area / 1e4, float((cover.sum(1) * grid).sum()) / area / 100


_UNIT = {shape: _unit_moments(shape) for shape in SHAPES}


def judge(images: Tensor, expected: Sequence[Expected]) -> list[dict[str, bool]]:
    """One verdict per attribute that the caption states, for each picture (n, 3, 64, 64) in [-1, 1].

    Keys: background, count, colour, shape, size, relation. colour, shape and size are true when every
    object has what was asked for it (so binding counts); relation only where two objects are told apart.
    Raises ValueError when the numbers of pictures and expectations differ.
    """
    if len(images) != len(expected):
        raise ValueError(f"{len(images)} pictures for {len(expected)} captions")
    return [verdict(reading, want) for reading, want in zip(read(images), expected)]


def verdict(reading: Reading, want: Expected) -> dict[str, bool]:
    """The attributes of one reading against one expectation, see `judge`."""
    result = {
        "background": reading.background == (want.background[0], want.background[-1]),
        "count": len(reading.items) == len(want.items),
    }
    order, clear = _assignment(reading.items, want)
    pairs = [(reading.items[j], item) for j, item in zip(order, want.items)]
    complete = len(pairs) == len(want.items)
    result["colour"] = complete and all(found.colour == item.colour for found, item in pairs)
    result["shape"] = complete and all(found.shape == item.shape for found, item in pairs)
    sized = [(found, item) for found, item in pairs if item.size_word]
    if any(item.size_word for item in want.items):
        result["size"] = complete and all((f.radius > SIZE_LIMIT) == (i.size_word == "large") for f, i in sized)
    if want.relation:
        result["relation"] = complete and clear and _relation(*(found for found, _ in pairs)) == want.relation
    return result


def _assignment(found: Sequence[Found], want: Expected) -> tuple[list[int], bool]:
    """Which found object stands for which expected one, and whether that is the only best choice."""
    if len(want.items) != 2 or len(found) < 2 or want.items[0] == want.items[1]:
        return list(range(min(len(found), len(want.items)))), True
    scores = []
    for order in ([0, 1], [1, 0]):
        hits = [(found[j].colour == w.colour) + (found[j].shape == w.shape) for j, w in zip(order, want.items)]
        scores.append((sum(hits), order))
    (a, first), (b, second) = scores
    return (first if a >= b else second), a != b


def _relation(a: Found, b: Found) -> str | None:
    dx, dy = b.x - a.x, b.y - a.y
    if max(abs(dx), abs(dy)) < MIN_OFFSET:
        return None
    if abs(dy) >= abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"

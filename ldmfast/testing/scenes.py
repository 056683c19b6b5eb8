"""Procedural captioned scenes: the training data and the ground truth of the shipped tiny model.

A scene is one object, two or three equal objects, or two different objects in a relation, on a plain or
two-tone background. Everything is analytic: a shape is a signed distance in pixels, a pixel's coverage
is ``clamp(0.5 - distance, 0, 1)``, so 64x64 pictures are anti-aliased without supersampling.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmfast.testing.captions import write_caption

# 8-bit RGB. Object and background colours are disjoint, so a pixel's nearest palette colour already
# says whether it belongs to an object.
OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "orange": (250, 135, 10),
    "yellow": (245, 225, 30),
    "green": (30, 150, 55),
    "cyan": (20, 200, 220),
    "blue": (30, 60, 210),
    "purple": (130, 35, 165),
    "black": (15, 15, 15),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (160, 160, 160),
    "pink": (255, 180, 210),
    "mint": (175, 235, 195),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
RELATIONS = ("above", "below", "left of", "right of")
DEFAULT_BACKGROUND = ("white",)
SIZE = 64
RADII = {"small": (7.5, 8.5), "large": (12.5, 13.5), None: (8.5, 12.5)}
# Half the side of the square a shape is drawn in: the widest is a triangle, 1.04 x 13.5 + 0.5 pixels.
_REACH = 16
# Pictures rendered at once: 128 patches of 32x32 fp32 distances stay in the L2 cache.
_RENDER_CHUNK = 128


@dataclass(frozen=True)
class Item:
    """One object: centre and radius in pixels of a 64-pixel picture, y downwards."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    size_word: str | None = None


@dataclass(frozen=True)
class Scene:
    """What is in the picture. `relation` is that of items[0] to items[1]; None for one kind of object.

    `background` has one name (plain) or two (top half, bottom half). `stated` tells whether the caption
    states the relation of a pair ("and" does not).
    """

    items: tuple[Item, ...]
    relation: str | None
    background: tuple[str, ...]
    caption: str = ""
    stated: bool = True

    @property
    def is_pair(self) -> bool:
        return self.relation is not None


def is_held_out(scene: Scene) -> bool:
    """True for the ~10% of combinations that training never sees.

    The combination is (count, colour, shape) or, for a pair, the unordered two (colour, shape): "a red
    circle above a blue square" and "a blue square below a red circle" are held out together.
    """
    if scene.is_pair:
        key = " ".join(sorted(f"{item.colour}-{item.shape}" for item in scene.items))
    else:
        key = f"{len(scene.items)} {scene.items[0].colour}-{scene.items[0].shape}"
    return zlib.crc32(key.encode()) % 10 == 0


def sample_scenes(
    n: int, seed: int, split: str = "train", style: str = "varied", pairs: float = 0.6
) -> list[Scene]:
    """`n` scenes with captions, a function of the arguments alone.

    split: "train", "heldout" (see `is_held_out`) or "all". style: "varied" captions or "plain" ones of
    the form "a red circle above a blue square". pairs: the share of scenes with two
    different objects; the others have one to three equal ones. Raises ValueError for another split or style.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split {split!r} is not one of train, heldout, all")
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = _draw(rng, pairs)
        if split == "all" or is_held_out(scene) == (split == "heldout"):
            scenes.append(write_caption(scene, rng, style))
    return scenes


def _draw(rng: random.Random, pairs: float) -> Scene:
    kind = rng.random()
    background = _draw_background(rng)
    if kind < pairs:
        return _draw_pair(rng, background)
    rest = (kind - pairs) / (1 - pairs)
    return _draw_equal(rng, background, 1 if rest < 0.35 else 2 if rest < 0.675 else 3)


def _draw_background(rng: random.Random) -> tuple[str, ...]:
    u = rng.random()
    if u < 0.35:
        return DEFAULT_BACKGROUND
    return tuple(rng.sample(list(BACKGROUND_COLOURS), 1 if u < 0.75 else 2))


def _draw_size(rng: random.Random, share: float = 0.25) -> tuple[str | None, float]:
    word = rng.choice(("small", "large")) if rng.random() < share else None
    return word, rng.uniform(*RADII[word])


def _draw_pair(rng: random.Random, background: tuple[str, ...]) -> Scene:
    looks = [(rng.choice(list(OBJECT_COLOURS)), rng.choice(SHAPES)) for _ in range(2)]
    while looks[0] == looks[1]:
        looks[1] = (rng.choice(list(OBJECT_COLOURS)), rng.choice(SHAPES))
    relation = rng.choice(RELATIONS)
    sizes = [_draw_size(rng, 0.15) for _ in range(2)]
    # Along the axis of the relation: a gap of at least 3 pixels between bounding circles, the pair
    # anywhere it fits; across it, a small shift only, so that the relation is never ambiguous.
    first, second = sizes[0][1], sizes[1][1]
    room = SIZE - 2 * (first + second) - 4
    gap = rng.uniform(3, max(3.0, min(8.0, room)))
    start = 2 + rng.uniform(0, max(0.0, room - gap))
    along = (start + first, start + 2 * first + gap + second)
    across = [rng.uniform(27, 37) for _ in range(2)]
    if relation in ("below", "right of"):
        along = (SIZE - along[0], SIZE - along[1])
    items = []
    for (colour, shape), (word, radius), a, b in zip(looks, sizes, along, across):
        x, y = (b, a) if relation in ("above", "below") else (a, b)
        items.append(Item(colour, shape, x, y, radius, word))
    return Scene(tuple(items), relation, background, stated=rng.random() < 0.92)


def _draw_equal(rng: random.Random, background: tuple[str, ...], count: int) -> Scene:
    colour, shape = rng.choice(list(OBJECT_COLOURS)), rng.choice(SHAPES)
    if count == 1:
        word, radius = _draw_size(rng)
        spots = [(rng.uniform(20, 44), rng.uniform(20, 44))]
    elif count == 2:
        word, radius = _draw_size(rng, 0.15)
        spots = [(x + rng.uniform(-1.5, 1.5), rng.uniform(27, 37)) for x in (16, 48)]
    else:  # one above two, or two above one
        word, radius = None, rng.uniform(8.5, 11)
        flip = rng.random() < 0.5
        spots = [(x, SIZE - y if flip else y) for x, y in ((32, 17), (17, 46), (47, 46))]
        spots = [(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)) for x, y in spots]
    return Scene(tuple(Item(colour, shape, x, y, radius, word) for x, y in spots), None, background)


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline (negative inside) at offsets x, y from the centre, y downwards.

    x, y and radius are floating tensors that broadcast. Raises ValueError for an unknown shape.
    """
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74 * radius).abs_() - 0.26 * radius
    if shape == "triangle":  # equilateral, point up, circumradius 1.2 r, bounding box centred
        side = 1.2 * radius
        y = y - 0.25 * side
        return torch.maximum(y, x.abs() * 0.8660254 - 0.5 * y) - 0.5 * side
    x, y = x.abs(), y.abs()
    if shape == "square":
        return torch.maximum(x, y) - 0.86 * radius
    if shape == "diamond":
        return (x + y - 1.12 * radius) * 0.70710678
    if shape == "cross":
        return torch.maximum(torch.maximum(x, y) - radius, torch.minimum(x, y) - 0.34 * radius)
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def palette(names: Sequence[str]) -> Tensor:
    """(n, 3) fp32 colours in [-1, 1]."""
    table = {**OBJECT_COLOURS, **BACKGROUND_COLOURS}
    return torch.tensor([table[name] for name in names], dtype=torch.float32) / 127.5 - 1


def render(scenes: Sequence[Scene], size: int = SIZE) -> Tensor:
    """(n, 3, size, size) fp32 pictures in [-1, 1]; `size` scales the 64-pixel layout."""
    chunks = [_render(scenes[i : i + _RENDER_CHUNK], size) for i in range(0, len(scenes), _RENDER_CHUNK)]
    return torch.cat(chunks) if chunks else torch.empty(0, 3, size, size)


def _render(scenes: Sequence[Scene], size: int) -> Tensor:
    image = torch.empty(len(scenes), size, size, 3)
    image[:, : size // 2] = palette([scene.background[0] for scene in scenes])[:, None, None]
    image[:, size // 2 :] = palette([scene.background[-1] for scene in scenes])[:, None, None]
    for k in range(max(len(scene.items) for scene in scenes)):  # the objects do not overlap: any order
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes) if len(s.items) > k and s.items[k].shape == shape]
            if rows:
                _draw_items(image, rows, [scenes[i].items[k] for i in rows], shape)
    return image.permute(0, 3, 1, 2).contiguous()


def _draw_items(image: Tensor, rows: list[int], items: list[Item], shape: str) -> None:
    """Blends one object of `shape` into each of the pictures `rows` of image (n, size, size, 3), in place."""
    size = image.shape[1]
    place = torch.tensor([(item.x, item.y, item.radius) for item in items]) * (size / SIZE)
    side = min(size, 2 * math.ceil(_REACH * size / SIZE))
    corner = (place[:, :2].round().long() - side // 2).clamp_(0, size - side)
    px, py = (corner[:, i, None] + torch.arange(side) for i in range(2))  # (n, side) pixel numbers
    dx, dy = px + 0.5 - place[:, 0, None], py + 0.5 - place[:, 1, None]
    distance = signed_distance(shape, dx[:, None, :], dy[:, :, None], place[:, 2, None, None])
    cover = (0.5 - distance).clamp_(0, 1)[..., None]
    where = (torch.tensor(rows)[:, None, None], py[:, :, None], px[:, None, :])
    colour = palette([item.colour for item in items])[:, None, None]
    image[where] = torch.lerp(image[where], colour.expand(-1, side, side, -1), cover)

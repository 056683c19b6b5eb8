"""The scenes: deterministic, in bounds, held-out split honoured, pictures equal to a brute-force oracle."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from ldmfast.testing.captions import expected_of, parse_caption
from ldmfast.testing.scenes import (
    BACKGROUND_COLOURS,
    OBJECT_COLOURS,
    RELATIONS,
    SHAPES,
    SIZE,
    Item,
    Scene,
    is_held_out,
    render,
    sample_scenes,
)


def test_same_seed_same_scenes() -> None:
    assert sample_scenes(64, 3) == sample_scenes(64, 3)
    assert sample_scenes(64, 3) != sample_scenes(64, 4)


def test_unknown_split_and_style_are_refused() -> None:
    with pytest.raises(ValueError, match="'test' is not one of train, heldout, all"):
        sample_scenes(1, 0, "test")
    with pytest.raises(ValueError, match="'short' is not one of plain, varied"):
        sample_scenes(1, 0, style="short")


def test_held_out_combinations_are_never_in_the_training_split() -> None:
    assert not any(is_held_out(scene) for scene in sample_scenes(3000, 1))
    assert all(is_held_out(scene) for scene in sample_scenes(300, 1, "heldout"))


def test_held_out_share_is_a_tenth() -> None:
    """All combinations counted: the hash is fixed, so the bound is that of a fair draw at 5 sigma."""
    looks = [Item(c, s, 0, 0, 1) for c in OBJECT_COLOURS for s in SHAPES]
    pairs = [Scene(pair, "above", ("white",)) for pair in itertools.combinations(looks, 2)]
    share = sum(map(is_held_out, pairs)) / len(pairs)
    assert abs(share - 0.1) < 5 * math.sqrt(0.09 / len(pairs))


def test_a_pair_is_held_out_in_both_orders() -> None:
    for scene in sample_scenes(200, 2, "all"):
        turned = Scene(scene.items[::-1], scene.relation, scene.background)
        assert is_held_out(turned) == is_held_out(scene)


def test_the_grammar_covers_what_the_model_promises() -> None:
    scenes = sample_scenes(4000, 0)
    assert {i.colour for s in scenes for i in s.items} == set(OBJECT_COLOURS) and len(OBJECT_COLOURS) >= 8
    assert {i.shape for s in scenes for i in s.items} == set(SHAPES) and len(SHAPES) >= 5
    assert {s.relation for s in scenes} == {*RELATIONS, None}
    assert {len(s.items) for s in scenes if not s.is_pair} == {1, 2, 3}
    assert {n for s in scenes for n in s.background} == set(BACKGROUND_COLOURS)
    assert {len(s.background) for s in scenes} == {1, 2}


def test_plain_captions_have_the_documented_form() -> None:
    item = dict(x=32.0, y=20.0, radius=9.0)
    pair = Scene((Item("red", "circle", **item), Item("orange", "square", **item)), "above", ("white",))
    import random

    from ldmfast.testing.captions import write_caption

    assert write_caption(pair, random.Random(0), "plain").caption == "a red circle above an orange square"
    three = Scene((Item("blue", "cross", **item),) * 3, None, ("gray", "pink"))
    assert write_caption(three, random.Random(0), "plain").caption == (
        "three blue crosses on a gray and pink background"
    )


def test_captions_read_back_to_their_scene() -> None:
    for scene in sample_scenes(2000, 11, "all"):
        assert parse_caption(scene.caption) == expected_of(scene), scene.caption


def test_every_wording_of_a_scene_is_used() -> None:
    words = Counter(word for scene in sample_scenes(4000, 5) for word in scene.caption.split())
    assert {"under", "beneath", "over", "grey", "one", "an", "with", "against", "2", "3"} <= set(words)


def test_a_caption_without_objects_is_refused() -> None:
    with pytest.raises(ValueError, match="names no colour and shape"):
        parse_caption("something nice")


def test_objects_are_inside_and_apart() -> None:
    for scene in sample_scenes(2000, 9, "all"):
        for item in scene.items:
            reach = 1.04 * item.radius if item.shape == "triangle" else item.radius
            assert min(item.x, item.y, SIZE - item.x, SIZE - item.y) >= reach, scene
        for a, b in itertools.combinations(scene.items, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius, scene


def test_relation_agrees_with_the_centres() -> None:
    signs = {"above": (1, 1), "below": (1, -1), "left of": (0, 1), "right of": (0, -1)}
    for scene in sample_scenes(1000, 4):
        if scene.is_pair:
            a, b = scene.items
            offset = (b.x - a.x, b.y - a.y)
            axis, sign = signs[scene.relation]
            assert sign * offset[axis] > abs(offset[1 - axis])


def _inside(item: Item, x: float, y: float) -> bool:
    """Point in shape by its vertices or radii, written apart from the signed distances."""
    u, v, r = x - item.x, y - item.y, item.radius
    if item.shape == "circle":
        return u * u + v * v < r * r
    if item.shape == "ring":
        return (0.48 * r) ** 2 < u * u + v * v < r * r
    if item.shape == "square":
        return abs(u) < 0.86 * r and abs(v) < 0.86 * r
    if item.shape == "diamond":
        return abs(u) + abs(v) < 1.12 * r
    if item.shape == "cross":
        return (abs(u) < r and abs(v) < 0.34 * r) or (abs(u) < 0.34 * r and abs(v) < r)
    # triangle: apex at -0.9 r, base at 0.9 r, half width growing linearly to 1.2 r sin 60
    return -0.9 * r < v < 0.9 * r and abs(u) < 1.2 * r * math.sin(math.pi / 3) * (v / r + 0.9) / 1.8


@pytest.mark.parametrize("shape", SHAPES)
def test_render_equals_supersampling(shape: str) -> None:
    """Mean absolute difference to 8x8 supersampling. The analytic coverage is exact for straight
    axis-aligned edges and off by at most 0.5 * (sqrt 2 - 1) of a pixel's range at the others; only the
    outline's pixels, fewer than 8 radii of 4096, can differ."""
    item = Item("black", shape, 30.3, 33.7, 11.0)
    picture = render([Scene((item,), None, ("white",))])[0, 0]
    sub = [(k + 0.5) / 8 for k in range(8)]
    cover = torch.zeros(SIZE, SIZE)
    for py, px in itertools.product(range(17, 51), range(13, 47)):
        cover[py, px] = sum(_inside(item, px + i, py + j) for i in sub for j in sub) / 64
    white, black = 250 / 127.5 - 1, 15 / 127.5 - 1
    oracle = white + (black - white) * cover
    bound = 0.5 * (math.sqrt(2) - 1) * (white - black) * 8 * item.radius / SIZE**2
    assert (picture - oracle).abs().mean() < bound


def test_render_is_independent_of_the_batch() -> None:
    scenes = sample_scenes(300, 6)
    assert torch.equal(render(scenes)[257:260], render(scenes[257:260]))
    assert render([]).shape == (0, 3, SIZE, SIZE)


def test_background_halves() -> None:
    item = Item("red", "circle", 32, 32, 9)
    picture = render([Scene((item,), None, ("pink", "mint"))])[0]
    corner = ((picture + 1) * 127.5).round()
    assert corner[:, 0, 0].tolist() == list(BACKGROUND_COLOURS["pink"])
    assert corner[:, 31, 63].tolist() == list(BACKGROUND_COLOURS["pink"])
    assert corner[:, 32, 0].tolist() == list(BACKGROUND_COLOURS["mint"])

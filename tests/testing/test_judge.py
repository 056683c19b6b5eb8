"""The judge: right on drawings, right on what the shipped autoencoder makes of them, and able to say no."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from ldmfast.testing.captions import Expected, expected_of, parse_caption
from ldmfast.testing.judge import judge, read
from ldmfast.testing.scenes import OBJECT_COLOURS, SHAPES, Item, Scene, render, sample_scenes

ATTRIBUTES = {"background", "count", "colour", "shape", "size", "relation"}


def _shares(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    rows: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        for name, right in verdict.items():
            rows[name].append(right)
    assert set(rows) == ATTRIBUTES
    return {name: sum(values) / len(values) for name, values in rows.items()}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return sample_scenes(400, 77, "all")


@pytest.fixture(scope="module")
def drawn(scenes: list[Scene]) -> torch.Tensor:
    return render(scenes)


def test_drawings_are_read_right(scenes: list[Scene], drawn: torch.Tensor) -> None:
    """The issue asks for 99.5% on every attribute: at most 2 of 400 pictures may be wrong."""
    shares = _shares(judge(drawn, [expected_of(scene) for scene in scenes]))
    assert min(shares.values()) >= 0.995, shares


def test_noise_of_a_tenth_of_the_range_is_survived(scenes: list[Scene], drawn: torch.Tensor) -> None:
    """Uniform noise of +-12/255 moves no pixel half-way to another palette colour (the nearest two are
    more than 60/255 apart), so background and colours stay as certain as without it."""
    noise = (torch.rand(drawn.shape, generator=torch.Generator().manual_seed(0)) - 0.5) * 2 * 12 / 127.5
    shares = _shares(judge(drawn + noise, [expected_of(scene) for scene in scenes]))
    assert shares["background"] >= 0.995 and shares["colour"] >= 0.995, shares


def _wrong(want: Expected, attribute: str) -> Expected | None:
    """The expectation with one attribute made wrong, or None when it does not state that attribute."""
    first = want.items[0]
    others = want.items[1:]
    if attribute == "background":
        return replace(want, background=("mint",) if want.background != ("mint",) else ("gray",))
    if attribute == "count":
        return replace(want, items=(first, first)) if not others else replace(want, items=(first,), relation=None)
    if attribute == "colour":
        used = {item.colour for item in want.items}
        return replace(want, items=(replace(first, colour=min(set(OBJECT_COLOURS) - used)), *others))
    if attribute == "shape":
        used = {item.shape for item in want.items}
        return replace(want, items=(replace(first, shape=min(set(SHAPES) - used)), *others))
    if attribute == "size" and first.size_word:
        other = "small" if first.size_word == "large" else "large"
        return replace(want, items=(replace(first, size_word=other), *others))
    if attribute == "relation" and want.relation:
        turned = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
        return replace(want, relation=turned[want.relation])
    return None


@pytest.mark.parametrize("attribute", sorted(ATTRIBUTES))
def test_one_wrong_attribute_is_called_wrong(scenes, drawn, attribute: str) -> None:
    wrong = [(i, _wrong(expected_of(scene), attribute)) for i, scene in enumerate(scenes)]
    rows = [(i, want) for i, want in wrong if want is not None]
    assert len(rows) >= 30
    verdicts = judge(drawn[[i for i, _ in rows]], [want for _, want in rows])
    assert sum(verdict[attribute] for verdict in verdicts) <= 0.005 * len(verdicts)


def test_swapped_binding_is_called_wrong() -> None:
    """A red circle and a blue square against "a blue circle and a red square": the right colours and the
    right shapes are there, on the wrong objects."""
    items = (Item("red", "circle", 32, 16, 10), Item("blue", "square", 32, 46, 10))
    picture = render([Scene(items, "above", ("white",))])
    right, swapped, turned = (
        judge(picture, [parse_caption(caption)])[0]
        for caption in (
            "a red circle above a blue square",
            "a blue circle above a red square",
            "a blue square above a red circle",
        )
    )
    assert all(right.values())
    assert not (swapped["colour"] and swapped["shape"])
    assert turned["colour"] and turned["shape"] and not turned["relation"]


def test_shuffled_captions_are_rarely_right(scenes: list[Scene], drawn: torch.Tensor) -> None:
    """Another scene's caption has all attributes by chance only: below 1 in 48 for one colour and shape."""
    wanted = [expected_of(scene) for scene in scenes]
    shuffled = random.Random(1).sample(wanted, len(wanted))
    verdicts = judge(drawn, shuffled)
    assert sum(all(verdict.values()) for verdict in verdicts) <= len(verdicts) / 48


def test_empty_and_blank_pictures() -> None:
    assert read(torch.empty(0, 3, 64, 64)) == []
    blank = torch.full((1, 3, 64, 64), 250 / 127.5 - 1)
    assert read(blank)[0].items == ()
    verdict = judge(blank, [parse_caption("a red circle above a blue square")])[0]
    assert verdict == {"background": True, "count": False, "colour": False, "shape": False, "relation": False}


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="the judge reads"):
        read(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="1 pictures for 0 captions"):
        judge(torch.zeros(1, 3, 64, 64), [])

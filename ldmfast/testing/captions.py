"""The caption grammar of the scenes: how a scene is put in words, and how the words are read back."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldmfast.testing.scenes import Scene

RELATION_PHRASES = {
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
PREFIXES = ("a picture of", "picture of", "an image of", "a drawing of", "there is")
NUMBER_WORDS = {2: ("two", "2"), 3: ("three", "3")}
PLURALS = {"cross": "crosses"}


def plural(shape: str) -> str:
    return PLURALS.get(shape, shape + "s")


def write_caption(scene: Scene, rng: random.Random, style: str = "varied") -> Scene:
    """The scene with a caption: "plain" (one form) or "varied" (prefixes, synonyms, "one", digits)."""
    if style not in ("plain", "varied"):
        raise ValueError(f"style {style!r} is not one of plain, varied")
    varied = style == "varied"
    if scene.is_pair:
        first, second = (_noun(scene, i, varied, rng) for i in range(2))
        assert scene.relation is not None
        phrases = RELATION_PHRASES[scene.relation] if scene.stated else ("and",)
        text = f"{first} {_pick(phrases, varied, rng)} {second}"
    elif len(scene.items) == 1:
        text = _noun(scene, 0, varied, rng)
    else:
        item = scene.items[0]
        words = [_pick(NUMBER_WORDS[len(scene.items)], varied, rng, 0.85), item.size_word, item.colour]
        text = " ".join(w for w in [*words, plural(item.shape)] if w)
    text += _background(scene, varied, rng)
    if varied and rng.random() < 0.12:
        text = f"{rng.choice(PREFIXES)} {text}"
    return replace(scene, caption=text)


def _pick(options: tuple[str, ...], varied: bool, rng: random.Random, first: float = 0.6) -> str:
    return options[0] if not varied or rng.random() < first else rng.choice(options)


def _noun(scene: Scene, index: int, varied: bool, rng: random.Random) -> str:
    item = scene.items[index]
    words = [word for word in (item.size_word, item.colour, item.shape) if word]
    article = "an" if words[0][0] in "aeiou" else "a"
    if varied and rng.random() < 0.1:
        article = rng.choice(("one", "the", ""))
    return " ".join(word for word in [article, *words] if word)


def _background(scene: Scene, varied: bool, rng: random.Random) -> str:
    """Nothing for the default background (sometimes), otherwise "on a white (and pink) background"."""
    from ldmfast.testing.scenes import DEFAULT_BACKGROUND

    if scene.background == DEFAULT_BACKGROUND and (not varied or rng.random() < 0.7):
        return ""
    names = list(scene.background)
    if varied:
        names = ["grey" if name == "gray" and rng.random() < 0.3 else name for name in names]
    word = _pick(("on a", "with a", "against a"), varied, rng, 0.75)
    return f" {word} {' and '.join(names)} background"

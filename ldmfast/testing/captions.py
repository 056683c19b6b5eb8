"""The caption grammar of the scenes: how a scene is put in words, and how the words are read back."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class ExpectedItem:
    """What a caption says about one object."""

    colour: str
    shape: str
    size_word: str | None = None


@dataclass(frozen=True)
class Expected:
    """What a caption asks for. `relation` is None when it states none; `background` (top[, bottom])."""

    items: tuple[ExpectedItem, ...]
    relation: str | None
    background: tuple[str, ...]


def expected_of(scene: Scene) -> Expected:
    """What the scene's own caption states."""
    items = tuple(ExpectedItem(item.colour, item.shape, item.size_word) for item in scene.items)
    return Expected(items, scene.relation if scene.stated else None, scene.background)


def parse_caption(caption: str) -> Expected:
    """Reads a caption of the grammar. Raises ValueError when it names no known colour and shape."""
    from ldmfast.testing.scenes import BACKGROUND_COLOURS, DEFAULT_BACKGROUND, OBJECT_COLOURS, SHAPES

    words = caption.lower().replace(",", " ").replace("grey", "gray").split()
    singular = {plural(shape): shape for shape in SHAPES} | {shape: shape for shape in SHAPES}
    counts = {word: n for n, forms in NUMBER_WORDS.items() for word in forms}
    items: list[ExpectedItem] = []
    colour, size, count = None, None, 1
    for word in words:
        if word in OBJECT_COLOURS:
            colour = word
        elif word in ("small", "large"):
            size = word
        elif word in counts:
            count = counts[word]
        elif word in singular and colour:
            items += [ExpectedItem(colour, singular[word], size)] * count
            colour, size, count = None, None, 1
    if not items:
        raise ValueError(f"caption {caption!r} names no colour and shape, as in 'a red circle above a blue square'")
    relation = _parse_relation(words) if len(items) == 2 and items[0] != items[1] else None
    background = tuple(word for word in words if word in BACKGROUND_COLOURS)[:2]
    return Expected(tuple(items), relation, background or DEFAULT_BACKGROUND)


def _parse_relation(words: list[str]) -> str | None:
    for relation, phrases in RELATION_PHRASES.items():
        if any(phrase.split()[-2:] == words[i : i + len(phrase.split()[-2:])]
               for phrase in phrases for i in range(len(words))):
            return relation
    return None

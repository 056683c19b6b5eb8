"""Weighted prompts of any length: "(word:1.3)", "((word))", "[word]", BREAK, and chunks of the encoder's size.

What a prompt means follows ComfyUI's text nodes: a number inside parentheses is the weight itself, whatever stands
around it; parentheses without one multiply by 1.1; ``\\(`` and ``\\)`` are characters. Square brackets (divide by 1.1)
and BREAK (start a new chunk) are AUTOMATIC1111's, which ComfyUI reads as words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import LdmfastError

STRONGER = 1.1
KEPT_TOGETHER = 8  # a piece of fewer tokens moves to the next chunk whole, as in ComfyUI

_PIECE = re.compile(r"\\[()\[\]]|[()\[\]]|\\|[^\\()\[\]]+")
_NUMBER = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*$")
_BREAK = re.compile(r"\bBREAK\b")
_CLOSES = {")": "(", "]": "["}


@dataclass(frozen=True)
class Chunk:
    """Token ids of one pass of a text encoder, start, end and padding included, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def _pieces(prompt: str) -> tuple[list[str], dict[int, int]]:
    """Brackets that have a partner and the texts between them, and the partner of each such bracket.

    A bracket without a partner is text."""
    found = _PIECE.findall(prompt)
    partner: dict[int, int] = {}
    waiting: list[int] = []
    for i, piece in enumerate(found):
        if piece in ("(", "["):
            waiting.append(i)
        elif piece in _CLOSES:
            opened = next((k for k in range(len(waiting) - 1, -1, -1) if found[waiting[k]] == _CLOSES[piece]), None)
            if opened is not None:
                partner[waiting[opened]], partner[i] = i, waiting[opened]
                del waiting[opened:]
    pieces: list[str] = []
    place: dict[int, int] = {}
    text_before = False
    for i, piece in enumerate(found):
        if i in partner:
            place[i] = len(pieces)
            pieces.append(piece)
        else:
            literal = piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece
            if text_before:
                pieces[-1] += literal
            else:
                pieces.append(literal)
        text_before = i not in partner
    return pieces, {place[i]: place[j] for i, j in partner.items()}


def weigh(prompt: str) -> list[tuple[str, float]]:
    """The prompt's texts in order, each with its weight. Raises LdmfastError for a weight that is no finite number."""
    pieces, partner = _pieces(prompt)
    found: list[tuple[str, float]] = []
    weights = [1.0]
    for i, piece in enumerate(pieces):
        if i not in partner:
            if piece:
                found.append((piece, weights[-1]))
        elif piece == "(":
            weight = weights[-1] * STRONGER
            last = partner[i] - 1
            number = _NUMBER.search(pieces[last]) if last not in partner else None
            if number and (last > i + 1 or number.start()):
                weight = float(number[1])
                pieces[last] = pieces[last][:number.start()]
            weights.append(weight)
        elif piece == "[":
            weights.append(weights[-1] / STRONGER)
        else:
            weights.pop()
        if not math.isfinite(weights[-1]):
            raise LdmfastError(f"a weight in the prompt {prompt[:40]!r} is {weights[-1]}: give numbers like 1.2")
    return found


def chunks(prompt: str, tokenize: Callable[[str], Sequence[int]], size: int, start: int, end: int, pad: int
           ) -> list[Chunk]:
    """The prompt in chunks of ``size`` tokens: ``start``, up to size - 2 tokens of text, ``end``, padding.

    tokenize: text to ids, without start and end. A text of one weight that has fewer than 8 tokens is not torn apart;
    a longer one goes on in the next chunk. An empty prompt is one chunk.
    """
    room = size - 2
    filled: list[list[tuple[int, float]]] = [[]]
    for text, weight in weigh(prompt):
        for i, part in enumerate(_BREAK.split(text)):
            if i:
                filled.append([])
            tokens = [(int(token), weight) for token in tokenize(part)]
            if KEPT_TOGETHER > len(tokens) > room - len(filled[-1]) and len(tokens) <= room:
                filled.append([])
            while len(tokens) > room - len(filled[-1]):
                take = room - len(filled[-1])
                filled[-1] += tokens[:take]
                tokens = tokens[take:]
                filled.append([])
            filled[-1] += tokens
    return [_closed(row, size, start, end, pad) for row in filled]


def empty(size: int, start: int, end: int, pad: int) -> Chunk:
    """The chunk of an empty prompt, which weights are measured from."""
    return _closed([], size, start, end, pad)


def _closed(row: list[tuple[int, float]], size: int, start: int, end: int, pad: int) -> Chunk:
    padding = size - 2 - len(row)
    ids = (start, *(token for token, _ in row), end, *(pad,) * padding)
    return Chunk(ids, (1.0, *(weight for _, weight in row), *(1.0,) * (padding + 1)))

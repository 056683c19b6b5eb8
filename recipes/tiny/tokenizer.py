"""The tiny model's CLIP tokenizer: one token a grammar word, bytes for everything else."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from ldmfast.testing.captions import NUMBER_WORDS, PREFIXES, RELATION_PHRASES, plural
from ldmfast.testing.scenes import BACKGROUND_COLOURS, OBJECT_COLOURS, SHAPES

MAX_TOKENS = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def grammar_words() -> list[str]:
    """Every word the caption grammar can write, sorted."""
    words = {"a", "an", "one", "the", "and", "on", "with", "against", "background", "small", "large", "grey", "1"}
    words.update(OBJECT_COLOURS, BACKGROUND_COLOURS, SHAPES, (plural(shape) for shape in SHAPES))
    for phrases in (*RELATION_PHRASES.values(), PREFIXES, *NUMBER_WORDS.values()):
        words.update(word for phrase in phrases for word in phrase.split())
    return sorted(words)


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in byte order (GPT-2's convention, as CLIP's)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(spare)) for b in range(256)]


def _merged(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: joins the best-ranked neighbours until no known pair is left."""
    while True:
        pairs = [(ranks[pair], pair) for pair in pairwise(symbols) if pair in ranks]
        if not pairs:
            return symbols
        best, out, i = min(pairs)[1], [], 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) == best:
                out.append(symbols[i] + symbols[i + 1])
                i += 2
            else:
                out.append(symbols[i])
                i += 1
        symbols = out


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make every word one token.

    Built word by word: what earlier merges leave of a word is joined from the left. Later merges rank
    lower, so they cannot disturb a word that earlier ones already complete.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = _merged([*word[:-1], word[-1] + "</w>"], ranks)
        while len(symbols) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    return sorted(ranks, key=ranks.__getitem__)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes vocab.json, merges.txt and the configs to `folder`; returns the tokenizer read from there."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = merges_for(grammar_words())
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "add_prefix_space": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": EOS,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": MAX_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(str(folder))

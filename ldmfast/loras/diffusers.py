"""diffusers' own layouts, from before it used peft: attention processors (``attn1.processor.to_q_lora.down.weight``),
then ``to_q.lora.down.weight``, and ``q_proj.lora_linear_layer.down.weight`` in text encoders; alphas beside them.
"""

from __future__ import annotations

import re

from .key import Key, dotted

_PROCESSOR = re.compile(r"(.+)\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_LAYER = re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.(down|up)\.weight$")
_IN_UNET = {"to_out": "to_out.0"}
_IN_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def parse(key: str) -> Key | None:
    if key.endswith(".alpha"):
        return _alpha(key.removesuffix(".alpha"))
    if match := _PROCESSOR.match(key):
        owner, leaf = match[1].removesuffix(".processor"), match[2]
        leaf = (_IN_TEXT if owner.endswith("self_attn") else _IN_UNET).get(leaf, leaf)
        return dotted(f"{owner}.{leaf}", match[3])
    match = _LAYER.match(key)
    return None if match is None else dotted(match[1], match[2])


def _alpha(owner: str) -> Key:
    """diffusers writes the alpha of a module, of its LoRA layer, or of that layer's weight."""
    for rest in ("", ".down.weight", ".lora.down.weight"):
        if found := parse(owner + rest):
            return found._replace(role="alpha")
    raise AssertionError(owner)  # the last one takes every name

"""What the key of one tensor in a LoRA file says, whatever the layout."""

from __future__ import annotations

import re
from typing import NamedTuple

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_COMPONENT = re.compile(r"(unet|text_encoder|text_encoder_2)\.")


class Key(NamedTuple):
    """component: "unet", "text_encoder", "text_encoder_2", or None where the layout does not say. module: of diffusers'
    network, or, if ``flat``, with underscores for dots. role: "down", "up" or "alpha"."""

    component: str | None
    module: str
    role: str
    flat: bool = False


def dotted(name: str, role: str) -> Key:
    """The key of a module that may have its component in front."""
    name = name.replace(".processor.", ".")
    match = _COMPONENT.match(name)
    return Key(match[1] if match else None, name[match.end():] if match else name, role)

"""Plans: for each linear and convolution whether it runs in 8 bits."""

from __future__ import annotations

import re

# First and last convolutions see and make the sample itself; embeddings and prompt projections run once a call.
_KEPT = re.compile(r"(^|\.)(conv_in|conv_out|time_emb_proj|to_kv|conv_shortcut)$|^(time_|class_|add_|encoder_hid_)")


def default_plan(name: str) -> bool:
    """Whether the layer of this name is W8A8 when nothing was calibrated (precision="int8")."""
    return _KEPT.search(name) is None

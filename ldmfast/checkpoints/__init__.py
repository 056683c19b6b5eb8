"""Checkpoints: what is in a file or folder, under which names, and how to read it without trusting it.

    parts = checkpoints.open_folder("path/to/diffusers-folder", variant="fp16")
    parts = checkpoints.open_single_file("model.safetensors")     # CompVis / ComfyUI layout

Both return a ``Parts``: ``.index`` is model_index.json's dictionary, ``.names`` the parts, ``.config(part)`` a
part's configuration dictionary, ``.weights(part, dtype, device)`` its tensors under diffusers' (or transformers')
names, ready for ``Model.from_weights(config, weights)``; ``.folder(part)`` is where a tokenizer is loaded from,
None in a single file.
"""

from __future__ import annotations

import os

from .folder import Folder
from .parts import Parts


def open_folder(path: str | os.PathLike[str], variant: str | None = None) -> Folder:
    """Opens a diffusers folder; nothing but model_index.json is read. Raises CheckpointError."""
    return Folder(path, variant)


__all__ = ["Folder", "Parts", "open_folder"]

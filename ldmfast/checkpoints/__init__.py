"""Checkpoints: what is in a file or folder, under which names, and how to read it without trusting it.

    parts = checkpoints.open_folder("path/to/diffusers-folder", variant="fp16")
    parts = checkpoints.open_single_file("model.safetensors")     # CompVis / ComfyUI layout

Both return a ``Parts``: ``.index`` is model_index.json's dictionary, ``.names`` the parts, ``.config(part)``
a part's configuration dictionary, ``.weights(part, dtype, device)`` its tensors under diffusers' (or
transformers') names, ready for ``Model.from_weights(config, weights)``; ``.folder(part)`` is where a
tokenizer is loaded from, None in a single file.
"""

from __future__ import annotations

import os
from pathlib import Path

from .folder import Folder
from .inspect import PartReport, Report, inspect
from .open_file import open_file
from .parts import Parts
from .single_file import SingleFile


def open_folder(path: str | os.PathLike[str], variant: str | None = None) -> Folder:
    """Opens a diffusers folder; nothing but model_index.json is read. Raises CheckpointError."""
    return Folder(path, variant)


def open_single_file(path: str | os.PathLike[str], prediction_type: str | None = None) -> SingleFile:
    """Opens a file in CompVis layout (safetensors, GGUF, or a PyTorch file); only its header is read.

    prediction_type: "epsilon" or "v_prediction", where the file does not say (infer.prediction_type has the rule).
    Raises CheckpointError.
    """
    return SingleFile(open_file(Path(path)), prediction_type)


__all__ = ["Folder", "PartReport", "Parts", "Report", "SingleFile", "inspect", "open_folder", "open_single_file"]

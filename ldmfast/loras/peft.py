"""peft's layout: ``lora_A`` (down) and ``lora_B`` (up). As diffusers writes it, with the component in front
(``unet.down_blocks...to_q.lora_A.weight``); as peft does, behind ``base_model.model.``, sometimes with the adapter's
name. Alphas are in peft's config: adapter_config.json, or in diffusers' files the header's ``lora_adapter_metadata``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .key import COMPONENTS, Key, dotted

METADATA = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"
_KEY = re.compile(r"(.+)\.lora_(A|B|down|up)(?:\.[^.]+)?\.weight$")  # down, up: ComfyUI's and trainers' of FLUX
# settings that change what a layer computes, and the values for which it is plain LoRA
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False), "fan_in_fan_out": (None, False), "lora_bias": (None, False),
    "bias": (None, "none"), "modules_to_save": (None, []), "peft_type": (None, "LORA"),
    "alora_invocation_tokens": (None,), "use_qalora": (None, False), "layer_replication": (None,)}


def parse(key: str) -> Key | None:
    match = _KEY.match(key)
    if match is None:
        return None
    return dotted(match[1].removeprefix("base_model.model."), "down" if match[2] in ("A", "down") else "up")


class Config:
    """peft's settings of one component, as far as they say how strong a layer is. Raises CheckpointError for settings
    that make something else than plain LoRA of it."""

    def __init__(self, values: Mapping[str, Any], where: str):
        for key, plain in _PLAIN.items():
            if values.get(key) not in plain:
                raise CheckpointError(f"{where}: {key} = {values[key]!r} in peft's config is not plain LoRA; merge it "
                                      "into the model with peft and save that")
        patterns = values.get("alpha_pattern") or {}
        if not all(re.fullmatch(r"\^?[\w.]+", p) for p in patterns):  # a foreign regular expression may never end
            raise CheckpointError(f"{where}: alpha_pattern {list(patterns)} in peft's config is not a list of module "
                                  "names; save the adapter with names")
        self.patterns = {p.lstrip("^"): _number(a, where) for p, a in patterns.items()}
        self.alpha = None if values.get("lora_alpha") is None else _number(values["lora_alpha"], where)
        self.root = bool(values.get("use_rslora"))

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank (Hu et al. 2021, section 4.1), or alpha / sqrt(rank) (Kalajdzievski 2023, rank-stabilised)."""
        alpha = next((a for p, a in self.patterns.items() if f".{module}".endswith(f".{p}")), self.alpha)
        return (rank if alpha is None else alpha) / (math.sqrt(rank) if self.root else rank)


def _number(value: Any, where: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise CheckpointError(f"{where}: alpha = {value!r} in peft's config is not finite; save the adapter again")
    return number


def configs(text: str, where: str) -> dict[str | None, Config]:
    """Settings by component (None: not said) from adapter_config.json, or from the metadata of diffusers' files."""
    try:
        values = json.loads(text)
        by_component: dict[str | None, dict[str, Any]] = {}
        for key, value in values.items():
            component, _, rest = key.partition(".")
            known = component in COMPONENTS
            by_component.setdefault(component if known else None, {})[rest if known else key] = value
        return {component: Config(v, where) for component, v in by_component.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where}: peft's config is not readable ({error}); save the adapter again") from error

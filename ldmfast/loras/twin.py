"""A network that shares everything with another one but some of its layers; neither is ever written to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ..models.base import Model
from ..models.joint_blocks import Modulations
from ..models.unet_state import Places

M = TypeVar("M", bound=nn.Module)


def shallow(module: M) -> M:
    """Another module with the same contents, whose own attributes, parameters and children can be replaced."""
    new = object.__new__(type(module))
    vars(new).update(vars(module))
    for kind in ("_parameters", "_buffers", "_modules"):
        vars(new)[kind] = copy.copy(vars(module)[kind])
    return new


def twin(model: Model, changed: Mapping[nn.Module, nn.Module]) -> Model:
    """model with some of its layers (those in ``changed``, also of the networks in ``variants``) replaced."""
    new: Model = _rebuilt(model, changed)
    if new is not model:
        new.variants = tuple(_rebuilt(v, changed) for v in new.variants)
    return new


def _rebuilt(module: Any, changed: Mapping[nn.Module, nn.Module]) -> Any:
    if module in changed:
        return changed[module]
    children = {name: None if m is None else _rebuilt(m, changed) for name, m in module._modules.items()}
    if all(children[name] is m for name, m in module._modules.items()):
        return module
    new = shallow(module)
    vars(new)["_modules"] = children
    if isinstance(vars(module).get("places"), Places):
        new.places = Places(new)
    if isinstance(vars(module).get("modulations"), Modulations):
        new.modulations = Modulations(new)
    return new

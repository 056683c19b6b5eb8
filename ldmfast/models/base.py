"""What every model shares: a frozen config read from diffusers' config.json, and weights that are only
read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

C = TypeVar("C", bound="Config")
M = TypeVar("M", bound="Model")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of the model configs; the fields are the keys of diffusers' config.json, with its defaults.

    choices: for a key that selects among variants, the values that are implemented.
    inert: keys that do not change the result at inference.
    """

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    inert: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Reads a config.json dictionary. Keys with a leading underscore and inert keys are skipped, unknown
        keys are skipped if they are unset (None, False); others raise CheckpointError naming key and value.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        known = {}
        for key, value in values.items():
            if key in cls.choices and _frozen(value) not in cls.choices[key]:
                raise unsupported(key, value, " or ".join(map(repr, cls.choices[key])))
            if key in names:
                known[key] = _frozen(value)
            elif key in cls.choices:
                continue
            elif not (key.startswith("_") or key in cls.inert or value is None or value is False):
                raise CheckpointError(f"config key {key!r} = {value!r} is not known to {cls.__name__}: "
                                      "remove it if it changes nothing, otherwise this model is not "
                                      "supported")
        config = cls(**known)
        try:
            config.check()
        except (TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{cls.__name__} does not fit together ({error}): compare config.json with "
                                  "the model it was made for") from error
        return config

    def check(self) -> None:
        """Raises CheckpointError where values contradict each other."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def unsupported(key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"config key {key!r} = {value!r} is not supported, needs {wanted}")


def per_level(key: str, value: Any, levels: int) -> tuple[Any, ...]:
    """One value for every resolution level: a scalar is repeated, a list must have that length."""
    if not isinstance(value, tuple):
        return (value,) * levels
    if len(value) != levels:
        raise CheckpointError(f"config key {key!r} = {list(value)!r} has {len(value)} entries, needs one for "
                              f"each of the {levels} levels")
    return value


class Model(nn.Module):
    """A network at inference: parameters are never written after loading and need no gradient."""

    config_class: ClassVar[type[Config]] = Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: Any = config

    @classmethod
    def from_config(cls: type[M], config: Config | Mapping[str, Any]) -> M:
        """Builds the network with torch's initial weights. config: the dataclass, or a config.json
        dictionary.

        Raises CheckpointError for keys or values that are not supported.
        """
        if not isinstance(config, cls.config_class):
            if isinstance(config, Config):
                raise CheckpointError(f"{cls.__name__} needs a {cls.config_class.__name__}, "
                                      f"not a {type(config).__name__}")
            config = cls.config_class.from_dict(config)
        return cls(config).requires_grad_(False).eval()

    @classmethod
    def from_weights(cls: type[M], config: Config | Mapping[str, Any],
                     weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> M:
        """Builds the network around the given tensors without copying them (diffusers' parameter names).

        Raises CheckpointError when a tensor is missing, left over, or of another shape than the config asks.
        """
        with torch.device("meta"):
            model = cls.from_config(config)
        tensors = dict(weights)
        check_names(cls.__name__, {k: v.shape for k, v in model.state_dict().items()}, tensors)
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def check_names(model: str, wanted: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> None:
    missing = [k for k in wanted if k not in given]
    if missing:
        raise CheckpointError(f"{model}: {len(missing)} of {len(wanted)} tensors are missing, first "
                              f"{missing[0]!r}; config and weights belong to different models, or a file is "
                              "absent")
    extra = [k for k in given if k not in wanted]
    if extra:
        raise CheckpointError(f"{model}: {len(extra)} tensors have no place in the model, first "
                              f"{extra[0]!r}; "
                              "config and weights belong to different models")
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise CheckpointError(f"{model}: {name!r} has shape {tuple(given[name].shape)}, the config asks "
                                  "for "
                                  f"{tuple(shape)}")

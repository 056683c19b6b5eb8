"""What every model shares: a frozen config read from diffusers' config.json, and weights that are only
read."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, LdmfastError
from ..ops._heap import freed_at_once
from ..quantization import Plan
from ..torch_modes import own_modes
from .config_values import check_values
from .gemm import Conv2d, Linear
from .layers import Joined
from .rowwise import FORMS, fits, rows_to_int8

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
        keys are skipped if they are unset (None, False); others raise CheckpointError naming key and value, as do
        values that check_values or check refuse.
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
        check_values(config)
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
        self.plan: Plan | None = None
        self.variants: tuple[Any, ...] = ()
        self.fp8_attention = False

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
    @own_modes()
    def from_weights(cls: type[M], config: Config | Mapping[str, Any],
                     weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, pack: bool = False,
                     int8: Plan | None = None, dtype: torch.dtype | None = None) -> M:
        """Builds the network from the given tensors (diffusers' parameter names), as they arrive.

        pack False: around the tensors, without copying those that have ``dtype`` already. pack True: brings each
        layer into the layout of its kernels as soon as its tensors are there, and lets go of them, so that no second
        copy of the model is ever in memory; such a model has no state_dict for other programs. int8: the plan by
        which layers become W8A8 (with pack only); they are rounded from the tensors as given. dtype: of all other
        floating tensors.
        Raises CheckpointError when a tensor is missing, left over, or of another shape than the config asks.
        """
        with torch.device("meta"):
            model = cls.from_config(config)
        wanted = {k: v.shape for k, v in model.state_dict().items()}
        units = _units(model) if pack else {}
        given: set[str] = set()
        with freed_at_once() if pack else contextlib.nullcontext():
            for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
                check_tensor(cls.__name__, wanted, name, tensor)
                given.add(name)
                waits = int8 is not None and name in units  # rounded to 8 bits, or converted, when it is complete
                if dtype is not None and tensor.is_floating_point() and not waits:
                    tensor = tensor.to(dtype)
                path, _, leaf = name.rpartition(".")
                owner = model.get_submodule(path)
                if leaf in owner._buffers:
                    owner.register_buffer(leaf, tensor)
                else:
                    owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
                if name in units and not units[name].waits_for(name):
                    units[name].settle(model, int8, dtype)
        check_complete(cls.__name__, wanted, given)
        model.requires_grad_(False)
        return model if int8 is None else model.with_plan(int8)

    def with_plan(self: M, plan: Plan) -> M:
        """Prepares one network for each range of timesteps of an int8 plan; they share this one's tensors."""
        if len(plan.ranges) > 1:
            self.variants = tuple(self._variant(r.kept) for r in plan.ranges)
            self.plan = plan
        return self

    def at(self: M, timesteps: Sequence[float]) -> M:
        """The network for these timesteps (one, or one a picture: then the one that leaves most in bf16)."""
        if self.plan is None:
            return self
        plan = self.plan
        return self.variants[max((plan.at(t) for t in timesteps), key=lambda i: len(plan.ranges[i].kept), default=0)]

    def __deepcopy__(self: M, memo: dict[int, Any]) -> M:
        """Shares what is packed for kernels: it is never written, and torch cannot copy oneDNN's layouts."""
        layers = [m for m in self.modules() if isinstance(m, (Linear, Conv2d))]
        shared: list[Any] = [m.int8 for m in layers if m.int8 is not None]
        shared += [m.layout for m in layers if isinstance(m, Conv2d) and m.layout is not None]
        shared += [t for t in (*self.parameters(), *self.buffers()) if t.is_mkldnn]
        memo |= {id(x): x for x in shared}
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def _variant(self: M, kept: frozenset[str]) -> M:
        twin = copy.deepcopy(self, {id(t): t for t in (*self.parameters(), *self.buffers())})
        for name, layer in twin.named_modules():
            if name in kept and isinstance(layer, (Linear, Conv2d)):
                layer.int8 = None
        return twin

    def attend_in_fp8(self, on: bool = True) -> None:
        """From the next call on, attention among the tokens of a picture (and its prompt, in joint blocks) multiplies
        e4m3 numbers, ``ops.attention_fp8``: faster where the GPU has such products, and less exact. Attention to
        prompts and to tokens with a mask stays as it is. For GPUs; of a pipeline: ``pipe.unet.attend_in_fp8()``, before
        adapters are loaded. Raises LdmfastError where one is active: its network shares layers with the one without."""
        if any(getattr(module, "lora", None) is not None for module in self.modules()):
            raise LdmfastError("attend_in_fp8: an adapter is active, and its network shares layers with the one "
                               "without; call unload_lora_weights() first, and load it again afterwards")
        self.fp8_attention = on
        for network in (self, *self.variants):
            for module in network.modules():
                if hasattr(type(module), "fp8"):
                    module.fp8 = on

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


@dataclasses.dataclass
class _Unit:
    """Layers that are packed together: one linear or convolution, or those of an attention that share an input."""

    module: str
    waiting: set[str]
    joined: str = ""  # the name of what a Joined makes of them

    def waits_for(self, name: str) -> bool:
        """Whether tensors are still missing when ``name`` has come."""
        self.waiting.discard(name)
        return bool(self.waiting)

    def settle(self, model: nn.Module, int8: Plan | None, dtype: torch.dtype | None) -> None:
        name, module = self.module, model.get_submodule(self.module)
        if isinstance(module, Joined):
            module.join(self.joined)
            name = f"{name}.{self.joined}"
            module = model.get_submodule(name)
        assert isinstance(module, (Linear, Conv2d))
        needed = int8 is not None and int8.needs_int8(name)
        by_rows = int8 is not None and int8.form in FORMS
        if int8 is not None and needed and by_rows and isinstance(module, Linear) and fits(module.weight):
            if module.bias is not None and dtype is not None:
                module.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
            module.quantize_rows(int8.form)
            return
        eight = rows_to_int8(module.weight) if needed and not by_rows else None
        if eight is not None and int8 is not None and not int8.needs_float(name):
            module.register_parameter("weight", None)  # before it is converted for nothing
        if dtype is not None:
            module.to(dtype)
        if int8 is None or by_rows or int8.needs_float(name):
            module.pack()
        if eight is not None and int8 is not None:
            module.quantize(*eight, keep=int8.needs_float(name))


def _units(model: nn.Module) -> dict[str, _Unit]:
    """Parameter name -> its unit, for everything that is packed."""
    units: dict[str, _Unit] = {}
    for path, module in model.named_modules():
        if isinstance(module, Joined):
            for joined, joins in module.groups:
                parts = tuple(f"{n}." for n in joins)
                names = {f"{path}.{n}" for n, _ in module.named_parameters() if n.startswith(parts)}
                units.update(dict.fromkeys(names, _Unit(path, names, joined)))
        elif isinstance(module, (Linear, Conv2d)) and f"{path}.weight" not in units:
            names = {f"{path}.{n}" for n, _ in module.named_parameters()}
            units.update(dict.fromkeys(names, _Unit(path, names)))
    return units


def check_tensor(model: str, wanted: Mapping[str, torch.Size], name: str, tensor: Tensor) -> None:
    if name not in wanted:
        raise CheckpointError(f"{model}: tensor {name!r} has no place in the model; config and weights belong to "
                              "different models")
    if tensor.shape != wanted[name]:
        raise CheckpointError(f"{model}: {name!r} has shape {tuple(tensor.shape)}, the config asks for "
                              f"{tuple(wanted[name])}")


def check_complete(model: str, wanted: Mapping[str, torch.Size], given: Collection[str]) -> None:
    missing = [k for k in wanted if k not in given]
    if missing:
        raise CheckpointError(f"{model}: {len(missing)} of {len(wanted)} tensors are missing, first "
                              f"{missing[0]!r}; config and weights belong to different models, or a file is "
                              "absent")

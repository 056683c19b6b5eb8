"""The int8 file beside a network's weights: int8 layers, everything else in bf16, and the plan in its header.

For a layer that runs in 8 bits it holds ``<layer>.int8.values`` (int8, the weight's shape) and ``<layer>.int8.scale``
(fp32, one for each output); layers are named as in the packed network (q, k and v joined). The header's metadata holds
the plan and a fingerprint of the weights that it was made from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..checkpoints import safetensors
from ..checkpoints.write import Writer, in_place
from ..errors import CheckpointError
from ..models.base import Model
from ..models.gemm import Conv2d, Linear
from ..models.layers import Joined
from ..models.rowwise import rows_to_int8
from ..ops._heap import freed_at_once
from .plan import Plan

M = TypeVar("M", bound=Model)
NAME = "ldmfast_int8.safetensors"


def save(path: Path, model: Model, plan: Plan, fingerprint: str) -> None:
    """Writes the int8 file of a network with plain weights (not packed), in place of an older one.

    Raises CheckpointError.
    """
    tensors = dict(_tensors(model, plan))
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with (in_place(path, over=True) as part,
          Writer(part, entries, {"ldmfast_int8": plan.to_json(), "weights": fingerprint}) as file):
        for name, tensor in tensors.items():
            file.write(name, tensor)


def _tensors(model: Model, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    joined: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, Joined):
            layers: dict[str, nn.Module] = {}
            for whole, parts in module.groups:
                joined |= {f"{name}.{n}" for n in parts}
                layers[f"{name}.{whole}"] = Linear.join([getattr(module, n) for n in parts])
        elif name in joined:
            continue
        else:
            layers = {name: module}
        for path, layer in layers.items():
            int8 = isinstance(layer, (Linear, Conv2d)) and plan.needs_int8(path)
            for leaf, p in layer.named_parameters(recurse=False):
                if leaf != "weight" or not int8 or plan.needs_float(path):
                    yield f"{path}.{leaf}", p.detach().to(torch.bfloat16).contiguous()
            for leaf, table in layer.named_buffers(recurse=False):  # SD 3's positions
                if leaf not in layer._non_persistent_buffers_set:
                    yield f"{path}.{leaf}", table.to(torch.bfloat16).contiguous()
            if int8:
                values, scale = rows_to_int8(cast(Tensor, layer.weight))
                yield f"{path}.int8.values", values.contiguous()
                yield f"{path}.int8.scale", scale


def read_plan(path: Path) -> tuple[Plan, str, safetensors.Header]:
    """The plan of an int8 file, the fingerprint of the weights it belongs to, and its header. Raises
    CheckpointError."""
    header = safetensors.read_header(path)
    try:
        text, fingerprint = header.metadata["ldmfast_int8"], header.metadata["weights"]
    except KeyError as error:
        raise CheckpointError(f"{path}: holds no int8 plan ({error}); write it again with 'ldmfast "
                              "quantize'") from error
    return Plan.from_json(text), fingerprint, header


def load(cls: type[M], config: Mapping[str, Any], header: safetensors.Header, plan: Plan) -> M:
    """The packed int8 network of an int8 file, layer by layer: no weight is in memory twice, none in fp32.

    Raises CheckpointError when tensors are missing, left over, or of another shape than the config asks.
    """
    with torch.device("meta"):
        model = cls.from_config(config)
        for module in list(model.modules()):
            if isinstance(module, Joined):
                for whole, _ in module.groups:
                    module.join(whole)
    where = str(header.path)
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    layers = dict(model.named_modules())
    names = sorted(header.tensors, key=_layer_of)  # all tensors of a layer, then the next layer
    stream = safetensors.load(header, names=names, mapped=False)
    with freed_at_once():
        for name, group in itertools.groupby(stream, lambda item: _layer_of(item[0])):
            tensors = {n[len(name) + 1:]: t for n, t in group}
            _fill(where, layers, wanted, name, tensors, plan)
    missing = [n for n, t in model.state_dict().items() if t.is_meta]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} tensors are missing, first {missing[0]!r}; write it again with "
                              "'ldmfast quantize'")
    return model.with_plan(plan)


def _layer_of(tensor: str) -> str:
    return tensor.rpartition(".")[0].removesuffix(".int8")


def _fill(where: str, layers: Mapping[str, nn.Module], wanted: Mapping[str, torch.Size], name: str,
          tensors: dict[str, Tensor], plan: Plan) -> None:
    values, scale = tensors.pop("int8.values", None), tensors.pop("int8.scale", None)
    shapes = {f"{name}.{leaf}": t for leaf, t in tensors.items()}
    if values is not None:
        shapes[f"{name}.weight"] = values
    for full, tensor in shapes.items():
        if full not in wanted or tensor.shape != wanted[full]:
            raise CheckpointError(f"{where}: {full!r} has shape {tuple(tensor.shape)}, the config asks for "
                                  f"{tuple(wanted[full]) if full in wanted else 'no such tensor'}")
    layer = layers[name]
    for leaf, tensor in tensors.items():
        if leaf in layer._buffers:
            layer.register_buffer(leaf, tensor)
        else:
            layer.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    if not isinstance(layer, (Linear, Conv2d)):
        return
    if (values is not None) != plan.needs_int8(name) or (values is None) != (scale is None) or (
            values is not None and (values.dtype != torch.int8 or scale is None or scale.dtype != torch.float32
                                    or scale.shape != values.shape[:1])):
        raise CheckpointError(f"{where}: the int8 tensors of {name!r} do not fit the plan; write it again with "
                              "'ldmfast quantize'")
    if "weight" in tensors:
        layer.pack()
    if values is not None:
        layer.quantize(values, scale, keep="weight" in tensors)

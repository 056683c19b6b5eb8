"""Self-attention that does something else for some rows of a batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import LdmfastError
from ..models.hooks import Attend

Own = Callable[..., Tensor]  # (q, k, v, bias, text, size)


@dataclass(frozen=True)
class Perturb:
    """Base of what stands in for the product of self-attention. layers: names of the attentions, or patterns that they
    contain, as diffusers' pag_applied_layers: "mid", "up.block_1", "blocks.3"."""

    layers: tuple[str, ...] = ("mid",)
    guidance: ClassVar[str] = "guidance"  # whose it is, for messages

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, text: int, size: tuple[int, int]) -> Tensor:
        """(N, tokens, heads, head_dim) in and out; the first ``text`` of the keys are the text's. size: height and
        width of the latents."""
        raise NotImplementedError

    def places(self, network: Any) -> frozenset[int]:
        """Blocks that it concerns."""
        return places(network, self.layers, self.guidance)


def attentions(network: Any) -> dict[str, int]:
    """The self-attentions of a network by name, and the places of their blocks. Raises LdmfastError for a network that
    has no hooks."""
    from ..models import FluxTransformer2D
    from ..models.joint_blocks import JointAttention
    from ..models.layers import Attention

    if isinstance(network, FluxTransformer2D):
        raise LdmfastError("a FluxTransformer2D attends to text and picture as one sequence in half of its blocks, "
                           "which cannot be perturbed; use CFG, APG or CFGZero with true_cfg_scale")
    blocks = {name: m.place for name, m in network.named_modules() if getattr(m, "place", -1) >= 0}
    found = {}
    for name, module in network.named_modules():
        own = isinstance(module, JointAttention) or (isinstance(module, Attention) and module.context_dim is None)
        block = name if name in blocks else name.rpartition(".")[0]
        if own and block in blocks:
            found[name] = blocks[block]
    return found


def places(network: Any, layers: Sequence[str], what: str) -> frozenset[int]:
    """Of the blocks whose self-attention one of these patterns names. A pattern that ends in a number means that whole
    number: "blocks.1" is not "blocks.10". Raises LdmfastError for one that names none."""
    known, found = attentions(network), set()
    for layer in layers:
        pattern = re.compile(layer + r"(?!\d)" if layer[-1:].isdigit() else layer)
        those = {place for name, place in known.items() if pattern.search(name)}
        if not those:
            raise LdmfastError(f"{what}: layers={layer!r} names none of the self-attentions of this "
                               f"{type(network).__name__}, which are {_listed(list(known))}")
        found |= those
    return frozenset(found)


def _listed(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 8 else [*names[:4], "...", *names[-3:]]) or "not there"


def check_layers(layers: Any) -> tuple[str, ...]:
    """One pattern or several. Raises LdmfastError."""
    several = (layers,) if isinstance(layers, str) else layers
    if not isinstance(several, (list, tuple)) or not several or not all(isinstance(x, str) and x for x in several):
        raise LdmfastError(f"layers={layers!r} must be a name of an attention or a list of such, for instance 'mid'")
    for layer in several:
        try:
            re.compile(layer)
        except re.error as error:
            raise LdmfastError(f"layers={layer!r} is not a pattern ({error})") from error
    return tuple(several)


def grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a picture's tokens, of latents of this size. Raises LdmfastError where they are no grid."""
    for step in range(1, max(size) + 1):
        for h, w in ((-(-size[0] // step), -(-size[1] // step)), (size[0] // step, size[1] // step)):
            if h * w == tokens:
                return h, w
    raise LdmfastError(f"{tokens} tokens are no grid over latents of {size[0]}x{size[1]}: ask for a height and width "
                       "that the network halves evenly")


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, text: int, size: object = None) -> Tensor:
    return ops.attention(q, k, v, bias=bias)


def by_branch(attends: Sequence[Own | None], size: tuple[int, int]) -> Attend:
    """Of a batch of branches: what each of them does, None for nothing else than the network."""
    runs: list[tuple[int, Own]] = []  # neighbours that do the same, as one
    for attend in attends:
        own = attend or plain
        if runs and runs[-1][1] is own:
            runs[-1] = (runs[-1][0] + 1, own)
        else:
            runs.append((1, own))

    def batch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, text: int) -> Tensor:
        n, done, outs = len(q) // len(attends), 0, []
        for count, attend in runs:
            rows = slice(done * n, (done + count) * n)
            done += count
            own = bias if bias is None or len(bias) == 1 else bias[rows]
            outs.append(attend(q[rows], k[rows], v[rows], own, text, size))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return batch

"""What guidance changes inside a network at one evaluation. It belongs to a call and comes in with the step, as caches
do: nothing of it is kept in the network, and a network without it pays one comparison a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# (q, k, v, bias, text) -> output, (N, tokens, heads, head_dim). text: how many of the keys, the first, are the text's
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", int], Tensor]


@dataclass(frozen=True)
class Hooks:
    """attend: what stands in for the product of a block's self-attention, by the block's place in the network.
    skipped: places of blocks that are left out."""

    attend: Mapping[int, Attend] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()

"""What transformers ask of a cache: the blocks one after another, and each block's place among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..caches import Session

Advance = Callable[[Tensor], Tensor]


def number_blocks(model: nn.Module, *kinds: type[nn.Module]) -> None:
    """Gives every block of these kinds its place in the network."""
    blocks: Any = (m for m in model.modules() if isinstance(m, kinds))
    for place, block in enumerate(blocks):
        block.place = place


def through(blocks: Sequence[Advance], x: Tensor, cache: Session | None = None,
            modulated: Callable[[], Tensor] | None = None) -> Tensor:
    """The picture's tokens through all blocks, or what a cache has in their place. modulated: what the first block's
    first layer sees."""
    if cache is None or modulated is None:
        for block in blocks:
            x = block(x)
        return x
    return cache.stack(x, lambda: through(blocks, x), lambda: through(blocks[:1], x),
                       lambda h: through(blocks[1:], h), modulated)

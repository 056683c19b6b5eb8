"""What recorded work takes for granted about a module: where its tensors are, and that nobody listens."""

from __future__ import annotations

from torch import Tensor, nn

from ..models.direct import hooked


def _address(x: Tensor) -> int:
    return id(x) if x.is_mkldnn else x.data_ptr()


class Watch:
    """The addresses of a module's parameters and buffers. Numbers written into them in place (a merged LoRA, or the
    tensors of one beside the weights) are read by the next replay; tensors put in their place are not, and that
    shows here."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        owners = [part for m in self.modules for part in (m._parameters, m._buffers)]
        self.slots = [(owner, name, x, _address(x)) for owner in owners for name, x in owner.items() if x is not None]

    def moved(self) -> bool:
        """Whether a tensor is another one than when this was made."""
        return any(owner.get(name) is not x or _address(x) != address for owner, name, x, address in self.slots)

    def hooked(self) -> bool:
        """Whether forward hooks wait for calls that a replay does not make."""
        return any(hooked(m) for m in self.modules)

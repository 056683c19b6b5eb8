"""LoRA (Hu et al. 2021) for native networks: y = W x + b + alpha / r up(down(x)), beside the weights or in them.

One key layout a file (``kohya``, ``diffusers``, ``peft``); ``side`` is the side path, ``fuse`` the fused mode,
``stack`` what a pipeline has loaded. A network with adapters is a twin that shares all else with the network as loaded.
"""

from .adapter import Adapter, load
from .read import Source
from .scales import Choice
from .stack import Stack

__all__ = ["Adapter", "Choice", "Source", "Stack", "load"]

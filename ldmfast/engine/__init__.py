"""The GPU engine: one step of the sampling loop, and the decoder, as CUDA graphs.

    pipe = ldmfast.Pipeline.from_pretrained(path, device="cuda", precision="bf16")   # pipe.engine is there
    pipe.engine = None                                                               # every call eager from now on

A graph belongs to a shape: pictures, height, width, guidance, precision. A new shape costs one eager step and its
capture; then a step is one launch, whatever solver, number of steps, guidance scale, seed or prompt. Where a cache or
the interval of a guidance leaves something out at some of the steps, each kind of step is a graph of its own.
"""

from __future__ import annotations

from .engine import Engine
from .graphs import CaptureError, CudaGraphs, Graphs
from .recorded import RecordedGraphs

__all__ = ["CaptureError", "CudaGraphs", "Engine", "Graphs", "RecordedGraphs"]

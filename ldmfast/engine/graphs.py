"""What the engine asks of a device: run a function once, record what it does to tensors, do that again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch

Replay = Callable[[], None]


class CaptureError(RuntimeError):
    """A function cannot be recorded; the text says why, in one line."""


class Graphs(Protocol):
    """A device's way of recording."""

    device_type: str

    def order(self) -> AbstractContextManager[object]:
        """While active, work is queued behind all earlier work of the engine, and what the caller queues afterwards
        comes behind it."""

    def capture(self, body: Callable[[], None]) -> Replay:
        """Runs ``body`` once, records it, and returns what does the same to the same tensors again, without Python.

        body reads and writes tensors that live as long as the replay. Raises CaptureError.
        """

    def drain(self) -> None:
        """Waits until nothing of the engine runs any more, so that graphs can be let go."""


class CudaGraphs:
    """CUDA graphs on a stream of their own. The graphs share one memory pool: they run one after another, and what
    they hand on lies in the engine's buffers, outside it. Has never run on a GPU."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        # the index now: another thread may have another current device
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()

    def order(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.cuda.device(self.device))
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        stack.callback(outside.wait_stream, self.stream)
        stack.enter_context(torch.cuda.stream(self.stream))
        return stack

    def capture(self, body: Callable[[], None]) -> Replay:
        body()  # Triton compiles, libraries choose their kernels and take their workspaces
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may allocate and copy meanwhile: only this one's calls can spoil the capture
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                body()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(str(error).splitlines()[0]) from error
        return graph.replay

    def drain(self) -> None:
        self.stream.synchronize()

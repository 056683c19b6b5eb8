"""Device time of short calls: many of them in one CUDA graph, over several sets of arguments so that none is found in
the cache."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GRAPH_S = 5e-3  # a replay this long makes its launch, some 10 us, count for nothing
MOST_CALLS, MOST_SETS, CACHES = 200, 16, 4  # the sets together are four times the second-level cache


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.preserve_format)
    return type(value)(copied(v) for v in value) if isinstance(value, (list, tuple)) else value


def repeated(function: Callable[..., Any], args: tuple[Any, ...], moved: float,
             seconds: Callable[[Callable[[], Any]], float]) -> tuple[Callable[[], None], int, str]:
    """(what to time, how many calls are in it, "graph" or why it is plain calls). moved: bytes of one call; seconds:
    times a call."""
    cuda = torch.cuda.is_available()
    cache = torch.cuda.get_device_properties(0).L2_cache_size if cuda else 1 << 20
    sets = [args, *(copied(args) for _ in range(min(MOST_SETS, int(CACHES * cache / max(moved, 1)))))]
    function(*args)
    calls = max(len(sets), min(MOST_CALLS, int(GRAPH_S / max(seconds(lambda: function(*args)), 1e-6))))

    def plain() -> None:
        for i in range(calls):
            function(*sets[i % len(sets)])

    if not cuda:
        return plain, calls, "no GPU"
    graph = torch.cuda.CUDAGraph()
    try:
        plain()
        with torch.cuda.graph(graph):
            plain()
    except RuntimeError as error:  # torch's own way may read a number on the host
        torch.cuda.synchronize()
        return plain, calls, str(error).splitlines()[0]
    return graph.replay, calls, "graph"


def facts() -> dict[str, str]:
    """Driver, clocks and power limit as found, by nvidia-smi's names; {} without it."""
    names = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total"
    try:
        found = subprocess.run(["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"], text=True,
                               capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(names.split(","), map(str.strip, found.splitlines()[0].split(","))))

"""What is installed here and which kernels run."""

from __future__ import annotations

import platform
from typing import Any


class Info(dict[str, Any]):
    """The facts as a dictionary; str() gives them as a short readable text."""

    def __str__(self) -> str:
        lines = [
            f"ldmfast {self['version']}, torch {self['torch']}, python {self['python']}",
            f"cpu     {self['cpu_isa'] or 'no compiled kernels'}"
            + (f" (has {', '.join(self['cpu_levels'])})" if self["cpu_levels"] else "")
            + f", {self['threads']} threads",
            f"cuda    {self['cuda'] or 'none'}"
            + (f", kernels for {', '.join(self['cuda_archs'])}" if self["cuda_archs"] else ""),
            f"triton  {self['triton'] or 'not installed'}",
        ]
        lines += [f"note    {note}" for note in self["notes"]]
        devices = ["cpu", "cuda"] if self["cuda"] else ["cpu"]
        for op, live in sorted(self["ops"].items()):
            lines.append(f"  {op:26s}" + "  ".join(f"{device}: {live[device]}" for device in devices))
        return "\n".join(lines)


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "pytorch-triton"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def info() -> Info:
    """Version, torch, instruction set, CUDA, and the live backend of every op.

    Keys: version, torch, python, cpu_levels (this CPU and build have), cpu_isa (in use; "" on references),
    cuda (device name; "" without one), cuda_archs, triton, threads, ops (op -> device -> backend), build (facts of
    the compiled part), notes (why something is not there).
    """
    import torch

    from . import __version__, ops
    from .ops import _load

    host = _load.host_module()
    compiled = ops.CPU_LIBRARY.loaded
    facts = host.build_facts() if host else {}
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    notes = []
    if not compiled:
        notes.append(f"C++ kernels: {ops.CPU_LIBRARY.reason}; every op runs on its reference")
    elif host is None:
        notes.append(f"ldmfast._C: {_load.build_record().get('host', 'not built')}")
    if cuda and not ops.CUDA_LIBRARY.loaded:
        notes.append(f"CUDA kernels: {ops.CUDA_LIBRARY.reason}")
    return Info(
        version=__version__, torch=torch.__version__, python=platform.python_version(),
        cpu_levels=host.cpu_levels() if host else [],
        cpu_isa=host.level_in_use() if host and compiled else "",
        cuda=cuda, cuda_archs=facts.get("cuda_archs", []) if ops.CUDA_LIBRARY.path.exists() else [],
        triton=_triton_version(), threads=torch.get_num_threads(),
        ops={name: {device: row.live(device) for device in ("cpu", "cuda")} for name, row in ops.ROWS.items()},
        build=facts, notes=notes,
    )

"""Times every op here: each live backend against what a torch user writes, interleaved in one run.

For every row and case it measures our kernel and ``row.peer`` (torch's own way) in turn, call by call, so that a busy
machine slows both alike, and takes medians. The share of the roofline is the least time that the op's bytes and
floating-point operations allow (``row.cost``), at the copy bandwidth and matmul rate measured in the same run, over
the time it took.

    python bench/ops.py                         # every network case, writes bench/results/<device>/ops.json
    python bench/ops.py --op attention --dtype bfloat16 --repeats 15
    python bench/ops.py --case sd15_64x64 --no-write
    python bench/ops.py --busy                  # others use the machine too: one thread, its own CPU time

Columns: ms of ours and of torch, their ratio (above 1 we are faster), and our share of the roofline.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu_clock
import torch
from tqdm import tqdm

import ldmfast
from ldmfast import ops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def clock(device: str, call: Callable[[], Any]) -> float:
    """Seconds of one call; on "cpu-time" those that this thread really ran."""
    if device == "cuda":
        torch.cuda.synchronize()
    now = time.thread_time if device == "cpu-time" else time.perf_counter
    start = now()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - start


def in_turn(names: Iterable[str], repeats: int) -> Iterator[str]:
    """Every name once a round; the order is reversed every other round."""
    forward = list(names)
    for i in range(repeats):
        yield from forward[:: 1 if i % 2 else -1]


def medians(timer: str, calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, taken in turn."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in in_turn(calls, repeats):
        times[name].append(clock(timer, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def roofline(timer: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a large copy (read and write counted) and flop/s of a large matmul, measured here."""
    n = 8192 if device == "cuda" else 1536  # a GPU takes 2 ms for either: waiting for it counts for nothing
    a = torch.randn(n, n, device=device).to(dtype)
    source = torch.empty(1 << (30 if device == "cuda" else 25), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = {name: min(clock(timer, call) for _ in range(10))
            for name, call in {"matmul": lambda: a @ a, "copy": lambda: target.copy_(source)}.items()}
    return {"bytes_per_s": 2 * source.numel() * 4 / best["copy"], "flop_per_s": 2 * n**3 / best["matmul"]}


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    return value


def measure(row: Any, case: Any, dtype: torch.dtype, timer: str, device: str, peak: dict[str, float],
            repeats: int) -> dict[str, Any]:
    args = to_device(case.args(dtype), device)
    cost = row.cost(*args)
    arms, how = {"ours": row.overload, "torch": row.peer}, {}
    with torch.inference_mode():
        if device == "cuda":
            many = {n: gpu_clock.repeated(arm, args, cost.bytes, partial(clock, timer)) for n, arm in arms.items()}
            found = medians(timer, {name: call for name, (call, _, _) in many.items()}, repeats)
            found = {name: seconds / many[name][1] for name, seconds in found.items()}
            how = {"timed": {name: text for name, (_, _, text) in many.items()}}
        else:
            found = medians(timer, {name: partial(arm, *args) for name, arm in arms.items()}, repeats)
    floor = max(cost.bytes / peak["bytes_per_s"], cost.flops / peak["flop_per_s"])
    return {
        "op": row.name, "case": case.name, "dtype": str(dtype)[6:], "backend": row.live(device),
        "ms": round(found["ours"] * 1e3, 4), "torch_ms": round(found["torch"] * 1e3, 4),
        "speedup": round(found["torch"] / found["ours"], 3), "roofline": round(floor / found["ours"], 3),
        "gflops": round(cost.flops / found["ours"] / 1e9, 1), "gbytes": round(cost.bytes / found["ours"] / 1e9, 2),
        **how}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return "cpu " + name.strip()


def commit() -> str:
    """HEAD's short name, with "-changed" where the measured code differs from it; $LDMFAST_COMMIT where the sources
    came without their history."""
    if os.environ.get("LDMFAST_COMMIT"):
        return os.environ["LDMFAST_COMMIT"]

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "csrc", "kernels", "ldmfast", "bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def conditions(device: str) -> dict[str, Any]:
    """What every record says about where and with what it was measured."""
    facts = ldmfast.info()
    return {"device": device_name(device), "commit": commit(), "torch": torch.__version__,
            "ldmfast": facts["version"], "cpu_isa": facts["cpu_isa"], "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0], **({"gpu": gpu_clock.facts()} if device == "cuda" else {})}


def result_path(device: str, name: str) -> Path:
    """Where the record of that name is kept. device: as ``device_name`` tells it."""
    return RESULTS / "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split()) / name


def write(record: dict[str, Any], name: str, folder: Path | None = None) -> Path:
    path = folder / name if folder else result_path(record["device"], name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", choices=sorted(ops.ROWS), help="only these ops")
    parser.add_argument("--case", nargs="*", help="only these cases (default: every case tagged network)")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"],
                        choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both arms")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; each arm runs once a round")
    parser.add_argument("--busy", action="store_true", help="one CPU thread, timed by the CPU time it got")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record (default: bench/results/<device>)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.busy:
        options.device, options.threads = "cpu", 1
    timer = "cpu-time" if options.busy else options.device
    torch.set_num_threads(options.threads)
    work = [(row, case, getattr(torch, dtype)) for dtype in options.dtype for _, row in sorted(ops.ROWS.items())
            if (row.name in options.op if options.op else options.device == "cpu" or not row.cpu_only)
            for case in row.cases()
            if (case.name in options.case if options.case else "network" in case.tags)]
    peaks = {dtype: roofline(timer, options.device, getattr(torch, dtype)) for dtype in options.dtype}
    rows: list[dict[str, Any]] = []
    record = {**conditions(options.device), "clock": "thread CPU time" if options.busy else "wall",
              "repeats": options.repeats, "peaks": peaks, "rows": rows, "failed": (failed := [])}
    for row, case, dtype in (progress := tqdm(work, unit="case", leave=False)):
        progress.set_description(f"{row.name} {case.name}")
        try:
            rows.append(measure(row, case, dtype, timer, options.device, peaks[str(dtype)[6:]], options.repeats))
        except RuntimeError as error:  # a kernel that does not start must not hide the others
            failed.append(f"{row.name} {case.name} {dtype}: {(str(error).splitlines() or [''])[0]}")
        if options.out:  # a time limit may end this at any moment
            write(record, "ops.json", options.out)
    width = max((len(r["case"]) for r in rows), default=4)
    print(f"{'op':20s} {'case':{width}s} {'dtype':9s} {'backend':9s} {'ms':>9s} {'torch':>9s} ratio  roofline")
    for r in rows:
        print(f"{r['op']:20s} {r['case']:{width}s} {r['dtype']:9s} {r['backend']:9s} {r['ms']:9.3f} "
              f"{r['torch_ms']:9.3f} {r['speedup']:5.2f} {r['roofline']:8.0%}")
    print("".join(f"FAILED {text}\n" for text in failed), end="")
    if not options.no_write:
        print(f"written to {write(record, 'ops.json', options.out)}")
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    main()

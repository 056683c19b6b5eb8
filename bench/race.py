"""Arms of one comparison, interleaved: each is built, checked against a reference output, and timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ops import clock, in_turn
from torch import Tensor
from tqdm import tqdm

Call = Callable[[], Tensor]
SAMPLE_S = 0.05  # a timed sample repeats short calls this long: one call of a kernel is below the timer's noise
SPARE = 1 << 30  # bytes left for activations and for the rest of the machine


@dataclass(frozen=True)
class Arm:
    """One way to do the work.

    build: returns the call to time and facts for the record ("earlier_s" counts as start-up, too: a conversion that
    was found in the cache). need: bytes of memory that building takes and keeps. compared: the output should equal
    the reference.
    """

    build: Callable[[], tuple[Call, dict[str, Any]]]
    version: str
    settings: str
    need: int = 0
    compared: bool = True


def package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name}, not installed"


def reason(error: BaseException) -> str:
    """One line: the error's class and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _resident(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def forget_peak() -> int | None:
    """Lets the peak start anew and returns what is resident; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def relative_rms(output: Tensor, reference: Tensor) -> float:
    """|output - reference| / |reference|, in float64. Raises ValueError for another shape or numbers not finite."""
    if output.shape != reference.shape:
        raise ValueError(f"output has shape {tuple(output.shape)}, the reference {tuple(reference.shape)}")
    wanted = reference.double()
    error = float((output.double() - wanted).norm() / wanted.norm())
    if not error < float("inf"):
        raise ValueError("output is not finite")
    return error


def _start(arm: Arm, reference: Tensor) -> tuple[Call, int, dict[str, Any]]:
    free = free_memory()
    if free is not None and free < arm.need + SPARE:
        raise MemoryError(f"needs about {(arm.need + SPARE) / 2**30:.1f} GiB, {free / 2**30:.1f} are free; "
                          "choose fewer arms")
    before = forget_peak()
    start = time.perf_counter()
    call, facts = arm.build()
    built = time.perf_counter()
    output = call()
    called = time.perf_counter()
    row = {**facts, "build_s": built - start, "first_call_s": called - built}
    if before is not None:
        row["peak_added_bytes"] = _resident("VmHWM") - before
    if arm.compared:
        row["error"] = relative_rms(output, reference)
    return call, max(1, int(SAMPLE_S / clock("cpu", call))), row


def race(arms: Mapping[str, Arm], reference: Tensor, repeats: int, title: str = "") -> dict[str, dict[str, Any]]:
    """Rows by arm's name: median_s, repeats_s, startup_s (all before the steady state), error (relative RMS against
    the reference), peak_added_bytes (resident memory at its peak in building and the first call, beyond what was there:
    weights shared with arms before do not count), version, settings; or version, settings and "unavailable" with the
    reason."""
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    numbers: dict[str, int] = {}
    with tqdm(total=len(arms) * (1 + repeats), unit="call", leave=False) as progress:
        for name, arm in arms.items():
            progress.set_description(f"{title}: start {name}")
            rows[name] = {"version": arm.version, "settings": arm.settings}
            try:
                calls[name], numbers[name], found = _start(arm, reference)
                rows[name].update(found)
            except Exception as error:  # whatever stops a peer is told in its row, and the others go on
                rows[name]["unavailable"] = reason(error)
            progress.update()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for name in in_turn(calls, repeats):
            progress.set_description(f"{title}: time {name}")
            call, number = calls[name], numbers[name]
            times[name].append(clock("cpu", lambda: [call() for _ in range(number)]) / number)  # noqa: B023
            progress.update()
    for name, seconds in times.items():
        add_times(rows[name], seconds)
        rows[name]["calls_per_repeat"] = numbers[name]
    return rows


def add_times(row: dict[str, Any], seconds: list[float]) -> None:
    """Adds median_s and repeats_s and, where build_s is known, startup_s."""
    row["median_s"], row["repeats_s"] = statistics.median(seconds), seconds
    if "build_s" in row:
        slow_start = max(0.0, row["first_call_s"] - row["median_s"])
        row["startup_s"] = row.get("earlier_s", 0.0) + row["build_s"] + slow_start

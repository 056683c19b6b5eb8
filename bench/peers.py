"""ldmfast against diffusers, torch.compile and OpenVINO: same weights, same threads, interleaved in one run.

    python bench/peers.py                               # everything: about an hour, 20 GiB of memory, 12 GB of disk
    python bench/peers.py --work attention tiny         # some of it; finished work is added to this commit's record
    python bench/peers.py --work sd15 --arms ldmfast "OpenVINO bf16" --no-write
    python bench/peers.py --level avx512_bf16           # every arm held to a CPU without AMX
    python bench/peers.py --cache ~/.cache/ldmfast-bench --plot    # keep conversions; draw docs/peers.png at the end
    python bench/peers.py --plot bench/results/<device>/peers.json    # only draw a record

Work:
  attention        the issue's four shapes, bf16 and fp32: torch SDPA, OpenVINO SDPA
  group_norm_silu  2x320x64x64 bf16 channels-last: torch GroupNorm + SiLU, and a plain copy
  sd15             one SD 1.5 UNet step, batch 2, 64x64 latents: every arm
  sdxl             one SDXL UNet step, batch 2, 64x64 latents: bf16 and int8
  dit              DiT-XL/2 forward, batch 2, 32x32 latents: bf16 and int8
  pixart           PixArt alpha at full width, 4 blocks, batch 2, 64x64 latents
  sd3              four blocks of SD3-medium's width, batch 2, 64x64 latents, 333 prompt tokens
  flux             two double and four single blocks of FLUX.1's width, 1024 image and 512 prompt tokens: bf16 and int8
  vae              SD VAE decode of one 512 px picture
  tiny             a whole call of the shipped model, 20 steps
  load             from an SD 1.5 checkpoint on disk to the first step done, in a fresh process

A repeat runs every arm once, in turn, the order reversed every other time; medians are compared. Weights are random,
of the real shapes. Start-up is everything from weights in memory to the steady speed: conversion, compilation,
packing, slow first call. The error is the relative RMS difference from diffusers fp32 (kernels: torch fp32), so that
an arm that does less work is seen. An arm that cannot run keeps its line, with the reason. The record goes to
bench/results/<device>/peers.json (peers-<level>.json with --level), written after each case; Ctrl-C keeps what is
finished. Install the peers with: pip install -r requirements-bench.txt
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from chart import draw
from ops import ROOT, conditions, result_path, write
from work import ATTENTION, WORK, Run

import ldmfast


@dataclass(frozen=True)
class Target:
    """measure: "faster" (peer's median over arm's, at least ``limit``), "slower" (arm's over peer's, at most), or a
    field of the arm's row (at most)."""

    case: str
    arm: str
    measure: str
    limit: float
    peer: str = ""


TARGETS = [
    *(Target(f"attention bf16 {shape}", "ldmfast", "faster", limit, "torch")
      for shape, limit in zip(ATTENTION, (3.0, 3.2, 2.8, 2.8))),
    *(Target(f"attention bf16 {shape}", "ldmfast", "faster", limit, "OpenVINO")
      for shape, limit in zip(ATTENTION, (1.4, 1.05, 1.05, 1.05))),
    Target("group_norm_silu bf16 2x320x64x64", "ldmfast", "faster", 3.5, "torch"),
    Target("group_norm_silu bf16 2x320x64x64", "ldmfast", "slower", 4.5, "plain copy"),
    Target("sd15", "ldmfast bf16", "faster", 1.9, "diffusers bf16"),
    Target("sd15", "ldmfast bf16", "faster", 1.5, "torch.compile bf16"),
    Target("sd15", "ldmfast bf16", "faster", 1.0, "OpenVINO bf16"),
    Target("sd15", "ldmfast bf16", "startup_s", 5.0),
    Target("sd15", "ldmfast int8", "faster", 2.9, "diffusers bf16"),
    Target("sd15", "ldmfast int8", "faster", 6.0, "diffusers fp32"),
    Target("sd15", "ldmfast int8", "faster", 1.5, "OpenVINO bf16"),
    Target("sd15", "ldmfast int8", "startup_s", 5.0),
    Target("sdxl", "ldmfast bf16", "faster", 1.7, "diffusers bf16"),
    Target("sdxl", "ldmfast int8", "faster", 2.8, "diffusers bf16"),
    Target("dit", "ldmfast bf16", "faster", 1.6, "diffusers bf16"),
    Target("dit", "ldmfast int8", "faster", 2.8, "diffusers bf16"),
    Target("pixart", "ldmfast bf16", "faster", 1.8, "diffusers bf16"),
    Target("pixart", "ldmfast int8", "faster", 2.8, "diffusers bf16"),
    Target("sd3", "ldmfast bf16", "faster", 1.8, "diffusers bf16"),
    Target("sd3", "ldmfast bf16", "faster", 1.05, "OpenVINO bf16"),
    Target("sd3", "ldmfast int8", "faster", 2.8, "diffusers bf16"),
    Target("sd3", "ldmfast int8", "faster", 1.6, "OpenVINO bf16"),
    Target("flux", "ldmfast bf16", "faster", 1.5, "diffusers bf16"),
    Target("flux", "ldmfast int8", "faster", 2.5, "diffusers bf16"),
    *(Target(work, f"ldmfast {precision}", "faster", limit, "OpenVINO bf16") for work in ("dit", "pixart", "flux")
      for precision, limit in (("bf16", 1.05), ("int8", 1.6))),
    Target("vae", "ldmfast bf16", "faster", 1.5, "diffusers bf16"),
    Target("tiny", "ldmfast exact", "faster", 3.0, "diffusers fp32"),
    Target("tiny", "ldmfast bf16", "faster", 3.0, "diffusers fp32"),
    Target("load", "ldmfast bf16", "median_s", 15.0),
    Target("load", "ldmfast bf16", "peak_over_kept", 1.1),
]
# What holds torch (ATen, MKL), oneDNN and OpenVINO to our level. MKL needs its own word: its bf16 product, which
# torch's attention uses, takes AMX whatever oneDNN was told.
LEVELS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E2"},
}


# --- record ---


def open_record(name: str, level: str | None) -> dict[str, Any]:
    """The record of this name if it is of the same commit, machine and threads; otherwise a new one."""
    settings = {name: os.environ[name] for name in ("LDMFAST_CPU_ISA", *LEVELS["avx2"]) if name in os.environ}
    record = {**conditions("cpu"), "level": level or "all the CPU has", "environment": settings,
              "cpu_capability": torch.backends.cpu.get_cpu_capability(), "diffusers": diffusers.__version__,
              "cases": {}}
    try:
        old = json.loads(result_path(record["device"], name).read_text())
    except (OSError, ValueError):
        return record
    same = all(old.get(key) == value for key, value in record.items() if key not in ("cases", "load_average"))
    return {**record, "cases": old["cases"]} if same else record


def value(target: Target, cases: Mapping[str, Any]) -> float | None:
    """What the target's measure came to, or None where an arm is missing."""
    rows = cases.get(target.case, {}).get("arms", {})
    arm, peer = rows.get(target.arm, {}), rows.get(target.peer, {})
    if target.measure not in ("faster", "slower"):
        return arm.get(target.measure)
    if "median_s" not in arm or "median_s" not in peer:
        return None
    ratio = peer["median_s"] / arm["median_s"]
    return ratio if target.measure == "faster" else 1 / ratio


def met(target: Target, found: float | None) -> bool | None:
    return None if found is None else found >= target.limit if target.measure == "faster" else found <= target.limit


def show(case: str, entry: Mapping[str, Any]) -> None:
    """The case's arms, fastest first."""
    rows = sorted(entry["arms"].items(), key=lambda item: item[1].get("median_s", float("inf")))
    print(f"\n{case}: {entry['note']}")
    for name, row in rows:
        if "unavailable" in row:
            print(f"  {name:20s} not available: {row['unavailable']}")
            continue
        spread = f"{min(row['repeats_s']):.4f}..{max(row['repeats_s']):.4f}"
        extra = [f"start-up {row['startup_s']:.1f} s"] if row.get("startup_s", 0) >= 0.1 else []
        extra += [f"error {row['error']:.1e}"] if "error" in row else []
        extra += [f"peak {row['peak_over_kept']:.2f}x of the weights"] if "peak_over_kept" in row else []
        extra += [f"peak +{row['peak_added_bytes'] / 2**30:.2f} GiB"] if "peak_added_bytes" in row else []
        print(f"  {name:20s} {row['median_s']:9.4f} s  ({spread})  {', '.join(extra)}")


def show_targets(cases: Mapping[str, Any]) -> None:
    print(f"\n{'targets':36s} {'arm':14s} {'measure':30s} {'found':>7s} {'target':>8s}")
    for target in TARGETS:
        if target.case in cases:
            found = value(target, cases)
            sign = ">=" if target.measure == "faster" else "<="
            verdict = {True: "met", False: "NOT met", None: "not measured"}[met(target, found)]
            measure = f"{target.measure} than {target.peer}" if target.peer else target.measure
            print(f"{target.case:36s} {target.arm:14s} {measure:30s} {'-' if found is None else f'{found:.2f}':>7s} "
                  f"{sign} {target.limit:5.2f}  {verdict}")


# --- command ---


def pin(threads: int) -> None:
    """This process and its children onto as many CPUs, one a core first."""
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return

    def sibling(cpu: int) -> int:
        try:
            text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
            return text.replace("-", ",").strip().split(",").index(str(cpu))
        except (OSError, ValueError):
            return 0

    allowed = sorted(os.sched_getaffinity(0), key=lambda cpu: (sibling(cpu), cpu))
    os.sched_setaffinity(0, allowed[:threads])


def hold(level: str) -> None:
    """Starts this command anew under the level's environment: the libraries read it when they are loaded."""
    wanted = {"LDMFAST_CPU_ISA": level, **LEVELS[level]}
    if any(os.environ.get(name) != word for name, word in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    found = ldmfast.info()
    if found["cpu_isa"] != level:
        sys.exit(f"--level {level}: this CPU and build have {', '.join(found['cpu_levels']) or 'no compiled kernels'}")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK), metavar="WORK", help="see above")
    parser.add_argument("--arms", nargs="+", default=[], metavar="WORD",
                        help='only arms whose name holds one of these words, such as ldmfast or "OpenVINO bf16"; '
                             "a case's record is replaced as a whole")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every arm")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; each arm runs once a round")
    parser.add_argument("--level", choices=list(LEVELS), help="hold every arm to this instruction set")
    parser.add_argument("--cache", type=Path, help="keeps OpenVINO's conversions and the checkpoint of load "
                                                   "(default: a temporary folder)")
    parser.add_argument("--plot", nargs="?", const="", metavar="RECORD",
                        help="draw docs/peers.png after measuring; with a record: only draw that")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(words)
    if options.threads < 1 or options.repeats < 1:
        parser.error("--threads and --repeats need at least 1")
    return options


def measure(options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    run = Run(options.threads, options.repeats, cache, tuple(options.arms))
    name = f"peers-{options.level}.json" if options.level else "peers.json"
    record = open_record(name, options.level)
    try:
        for work in options.work:
            with torch.inference_mode():
                for case, entry in WORK[work](run):
                    if not entry["arms"]:
                        continue
                    record["cases"][case] = {**entry, "repeats": run.repeats, "load_average": os.getloadavg()[0]}
                    show(case, entry)
                    if not options.no_write:
                        write(record, name)
            gc.collect()
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept")
    show_targets(record["cases"])
    if not options.no_write and record["cases"]:
        print(f"\nwritten to {result_path(record['device'], name)}")
    return record


def main() -> None:
    options = arguments()
    docs = ROOT / "docs"
    if options.plot:
        record = Path(options.plot)
        print(f"drawn in {draw(json.loads(record.read_text()), docs / f'{record.stem}.png')}")
        return
    if options.level:
        hold(options.level)
    pin(options.threads)
    cache = options.cache or Path(tempfile.mkdtemp(prefix="peers"))
    try:
        record = measure(options, cache)
    finally:
        if not options.cache:
            shutil.rmtree(cache)
    if options.plot is not None:
        print(f"drawn in {draw(record, docs / (f'peers-{options.level}.png' if options.level else 'peers.png'))}")


if __name__ == "__main__":
    main()

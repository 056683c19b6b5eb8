"""What caches gain and cost: the shipped model with each of them, and how well a plan's time is foreseen.

    python bench/caches.py                      # writes bench/results/<device>/caches.json
    python bench/caches.py --network dit        # the shipped transformer; writes caches-dit.json
    python bench/caches.py --count 512 --no-write
    python bench/caches.py --sd15 --no-write    # a Stable Diffusion 1.5 UNet of random weights instead

Tiny: whole calls (text, 20 DDIM steps with guidance, VAE) for held-out captions, the settings taken in turn for every
few captions, so that all meet the same machine; and the shipped LCM in 4 steps of one forward. Printed for each:
seconds a picture, the ratio to exact without a cache (the median over the turns), network evaluations, PSNR from the
exact pictures of the same seeds (mean and least, dB), the share of right attributes, and kilobytes held a picture.

SD 1.5: one evaluation that computes everything and one that reuses are timed alone; the plan's time is what these say
for its steps, and the plan is run in turn with them: batch 2, 64x64 latents, bf16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from arms import SD15_UNET, random_model
from ops import conditions, medians, write
from torch import Tensor

import ldmfast
from ldmfast.caches import (
    FORA,
    PAB,
    CFGCache,
    DeepCache,
    EasyCache,
    FirstBlock,
    MagCache,
    Policy,
    Session,
    TaylorSeer,
    TeaCache,
    TGate,
    residual_ratios,
)
from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import judge
from ldmfast.testing.scenes import sample_scenes

STEPS, CHUNK = 20, 10
# words, how the name begins, least speed-up, and what else a row must be; exact is the row without a cache
TARGETS = [("2.0x at 30 dB", "exact", 2.0, lambda row, exact: row["psnr"] >= 30),
           ("3.0x within 1 point", "exact", 3.0, lambda row, exact: row["attributes"] >= exact["attributes"] - 0.01),
           ("int8 + cache, 4.0x within 1 point", "int8", 4.0,
            lambda row, exact: row["attributes"] >= exact["attributes"] - 0.01),
           ("LCM 4 steps, 9x within 3 points", "lcm", 9.0,
            lambda row, exact: row["attributes"] >= exact["attributes"] - 0.03)]

Caches = Policy | list[Policy] | None
# Placed by searches over latent errors of training captions. Six evaluations; and five, with two of the shallow part,
# which cost about a fifth of one each, where forecasts stray most: before the last third, and at the end.
SIX: Caches = TaylorSeer(interval=(0, 5, 9, 13, 17, 19), order=1, on="output")
MIXED: Caches = [TaylorSeer(interval=(0, 5, 8, 11, 13, 17, 19), order=2, on="output"),
                 DeepCache(interval=(0, 5, 8, 11, 17))]


def settings(ratios: list[float]) -> dict[str, tuple[str, Caches]]:
    """Name -> precision and cache."""
    return {
        "exact": ("exact", None),
        "DeepCache 3": ("exact", DeepCache(interval=3)),
        "DeepCache 5": ("exact", DeepCache(interval=5)),
        "FORA 3": ("exact", FORA(interval=3)),
        "CFGCache 2": ("exact", CFGCache(interval=2)),
        "CFGCache 2 + DeepCache 3": ("exact", [CFGCache(interval=2), DeepCache(interval=3)]),
        "PAB 2, 3": ("exact", PAB()),
        "TGate 8": ("exact", TGate(gate=8)),
        "FirstBlock 0.3": ("exact", FirstBlock(threshold=0.3)),
        "TeaCache 1": ("exact", TeaCache(threshold=1.0)),
        "MagCache 0.1": ("exact", MagCache(ratios=ratios, threshold=0.1)),
        "EasyCache 0.5": ("exact", EasyCache(threshold=0.5)),
        "TaylorSeer layers 3": ("exact", TaylorSeer(interval=3)),
        "TaylorSeer deep 3": ("exact", TaylorSeer(interval=3, on="deep")),
        "TaylorSeer output 3": ("exact", TaylorSeer(interval=3, on="output")),
        "TaylorSeer output 5": ("exact", TaylorSeer(interval=5, on="output")),
        "TaylorSeer output, 6 placed": ("exact", SIX),
        "5 placed + 2 shallow": ("exact", MIXED),
        "int8": ("int8", None),
        "int8 + TaylorSeer output 2": ("int8", TaylorSeer(interval=2, on="output")),
        "int8 + TaylorSeer output 3": ("int8", TaylorSeer(interval=3, on="output")),
        "int8 + 6 placed": ("int8", SIX),
        "int8 + 5 placed + 2 shallow": ("int8", MIXED),
    }


def shares(pictures: Tensor, expected: list[Any]) -> float:
    """Mean over the attributes of the share that is right."""
    rows: dict[str, list[bool]] = defaultdict(list)
    for verdict in judge(pictures, expected):
        for attribute, right in verdict.items():
            rows[attribute].append(right)
    return statistics.mean(sum(v) / len(v) for v in rows.values())


def tiny(network: str, count: int, only: list[str] | None) -> dict[str, Any]:
    scenes = sample_scenes(count, 31, "heldout")
    call = {"num_inference_steps": STEPS, "solver": {"unet": "ddim", "dit": "flow_euler"}[network],
            "output_type": "np", "progress": False}
    pipes = {p: ldmfast.Pipeline.tiny(network, precision=p) for p in ("exact", "int8")}
    calls = dict.fromkeys(pipes, call)
    for precision in ("exact", "bf16", "int8") if network == "unet" else ():
        pipes[f"lcm {precision}"] = ldmfast.Pipeline.tiny("lcm", precision=precision)
        calls[f"lcm {precision}"] = {"num_inference_steps": 4, "output_type": "np", "progress": False}
    training = [s.caption for s in sample_scenes(4, 7, "train")]
    arms = settings(residual_ratios(pipes["exact"], training, generator=0, **call))
    arms |= {name: (name, None) for name in pipes if name.startswith("lcm")}
    arms = {name: arm for name, arm in arms.items() if name == "exact" or only is None or name in only}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    pictures: dict[str, list[Tensor]] = {name: [] for name in arms}
    reports: dict[str, Any] = {}
    for name, (precision, cache) in list(arms.items()):  # warms up, and finds what the network does not have
        try:
            pipes[precision](training[0], generator=0, cache=cache, **calls[precision])
        except ldmfast.LdmfastError as error:
            print(f"{name:29s} left out: {error}")
            for rows_of in (arms, seconds, pictures):
                del rows_of[name]
    for first in range(0, count, CHUNK):
        part = range(first, min(first + CHUNK, count))
        captions = [scenes[i].caption for i in part]
        for name, (precision, cache) in arms.items():
            start = time.perf_counter()
            out = pipes[precision](captions, generator=list(part), cache=cache, **calls[precision])
            seconds[name].append((time.perf_counter() - start) / len(part))
            pictures[name].append(torch.as_tensor(out.images).permute(0, 3, 1, 2).float() * 2 - 1)
            reports[name] = out.report
    expected = [expected_of(scene) for scene in scenes]
    drawn = {name: torch.cat(parts) for name, parts in pictures.items()}
    rows = {}
    for name, report in reports.items():
        psnr = 10 * torch.log10(4 / (drawn[name] - drawn["exact"]).square().flatten(1).mean(1).clamp(min=1e-12))
        groups = 1 if report is None else len(report.evaluations)
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "speedup": statistics.median(a / b for a, b in zip(seconds["exact"], seconds[name])),
            "evaluations": (calls[arms[name][0]]["num_inference_steps"] if report is None
                            else statistics.mean(report.evaluations)),
            "psnr": float(psnr.mean()), "least_psnr": float(psnr.min()),
            "attributes": shares(drawn[name], expected),
            "kilobytes": 0.0 if report is None else report.bytes / groups / 1024}
        row = rows[name]
        print(f"{name:29s} {row['seconds'] * 1e3:7.1f} ms  {row['speedup']:5.2f}x  {row['evaluations']:4.1f} forwards"
              f"  {row['psnr']:6.1f} dB (least {row['least_psnr']:5.1f})  {row['attributes']:.2%}"
              f"  {row['kilobytes']:7.0f} kB")
    for words, kind, least, good in TARGETS:
        tried = {n: r for n, r in rows.items() if arms[n][0].startswith(kind) and (n not in pipes or kind == "lcm")}
        best = max(((r["speedup"], n) for n, r in tried.items() if good(r, rows["exact"])),
                   default=(0.0, "none is as good"))
        if tried:
            print(f"target {words}: {'met' if best[0] >= least else 'missed'} ({best[1]}, {best[0]:.2f}x)")
    return {"network": network, "count": count, "rows": rows}


def sd15(policy: Policy, steps: int, repeats: int) -> dict[str, Any]:
    net = ldmfast.models.from_diffusers(random_model(diffusers.UNet2DConditionModel, SD15_UNET), precision="bf16")
    times = [999.0 - i * (999.0 / steps) for i in range(steps)]
    state, x = net.prepare(times, torch.randn(2, 77, 768)), torch.randn(2, 4, 64, 64)

    def evaluation(session: Session, step: int) -> Tensor:
        return session.evaluate(lambda rows: net(rows, times[step], state=state, cache=session), x, step)

    def fresh() -> Session:
        session = Session.of([policy], net, times)
        assert session is not None
        return session

    actions = [a.value for a in policy.plan(fresh().call)["deep"]]
    warm = fresh()
    evaluation(warm, 0)

    def plan() -> None:
        session = fresh()
        for step in range(steps):
            evaluation(session, step)

    found = medians("wall", {"full": lambda: evaluation(fresh(), 0),
                             "reuse": lambda: evaluation(warm, actions.index("reuse")), "plan": plan}, repeats)
    foreseen = sum(found["full" if a == "compute" else "reuse"] for a in actions)
    off = found["plan"] / foreseen - 1
    print(f"{policy}: computing {found['full']:.3f} s, reusing {found['reuse']:.3f} s; {steps} steps foreseen "
          f"{foreseen:.2f} s, measured {found['plan']:.2f} s ({off:+.1%}; "
          f"{'met' if abs(off) <= 0.1 else 'missed'}), {steps * found['full'] / found['plan']:.2f}x")
    return {"policy": repr(policy), **found, "foreseen": foreseen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="captions")
    parser.add_argument("--network", choices=["unet", "dit"], default="unet")
    parser.add_argument("--only", nargs="+", help="these settings and exact, by the names that are printed")
    parser.add_argument("--sd15", action="store_true", help="the plan of an SD 1.5 UNet instead")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with torch.inference_mode():
        found = (sd15(DeepCache(interval=3), 6, options.repeats) if options.sd15 else
                 tiny(options.network, options.count, options.only))
    if not options.no_write:
        name = "caches-sd15.json" if options.sd15 else "caches-dit.json" if options.network == "dit" else "caches.json"
        print(write({**conditions("cpu"), **found}, name, options.out))


if __name__ == "__main__":
    main()

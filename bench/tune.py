"""tune(min_psnr=30) on the shipped models against every setting of bench/caches.py, on unseen captions, in one run.

    python bench/tune.py                          # writes bench/results/<device>/tune.json
    python bench/tune.py --count 20 --budget 60 --networks unet --no-write
    python bench/tune.py --certificate folder     # and the tuned UNet's certificate with the plot of its search

Both search and test draw calls of --batch pictures; captions and seeds of the two are different ones. Printed for each
setting: the ratio to exact (the median over the calls), mean and least PSNR from the exact pictures of the same seeds.
Then the targets.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from caches import settings as by_hand
from ops import conditions, write

import ldmfast
from ldmfast.caches import residual_ratios
from ldmfast.testing.scenes import sample_scenes
from ldmfast.tuning import Settings, certify, psnr
from ldmfast.tuning.measure import draw

STEPS, LIMIT, SCREEN = 20, 30.0, 29.0


class Row:
    """One setting's calls."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ratios: list[float] = []
        self.psnr: list[float] = []

    def summary(self) -> dict[str, Any]:
        return {"settings": str(self.settings), "speedup": statistics.median(self.ratios),
                "psnr": statistics.fmean(min(p, 100.0) for p in self.psnr), "least_psnr": min(self.psnr),
                "pictures": len(self.psnr)}


def hand_set(pipe: ldmfast.Pipeline) -> dict[str, Row]:
    training = [s.caption for s in sample_scenes(4, 7, "train")]
    ratios = residual_ratios(pipe, training, generator=0, num_inference_steps=STEPS, progress=False)
    found = {}
    for name, (precision, cache) in by_hand(ratios).items():
        if name != "exact":
            found[name] = Row(Settings(precision=precision, cache=cache or ()))
    return found


def compare(pipe: ldmfast.Pipeline, tuned: Settings, count: int, batch: int) -> dict[str, Row]:
    captions = [scene.caption for scene in sample_scenes(count, 31, "heldout")]
    rows = {**hand_set(pipe), "tuned": Row(tuned)}
    for name, row in list(rows.items()):  # warms up, and finds what the network does not have
        try:
            draw(pipe, row.settings, captions[:1], [0], {})
        except ldmfast.LdmfastError as error:
            print(f"{name:29s} left out: {error}")
            del rows[name]
    for first in range(0, count, batch):
        part, seeds = captions[first:first + batch], list(range(first, min(first + batch, count)))
        exact = draw(pipe, Settings(), part, seeds, {})
        for name, row in list(rows.items()):
            if first == batch and name != "tuned" and statistics.fmean(row.psnr) < SCREEN:
                print(f"{name:29s} {statistics.fmean(row.psnr):5.1f} dB over {len(row.psnr)} pictures: left out")
                del rows[name]
                continue
            drawn = draw(pipe, row.settings, part, seeds, {})
            row.ratios.append(exact.seconds / drawn.seconds)
            row.psnr += psnr(drawn.images, exact.images).tolist()
    return rows


def network(name: str, options: argparse.Namespace) -> dict[str, Any]:
    pipe = ldmfast.Pipeline.tiny(name)
    captions = [scene.caption for scene in sample_scenes(options.prompts, 41, "heldout")]
    tuned = pipe.tune(captions, min_psnr=LIMIT, budget_s=options.budget, seed=10_000, batch=options.batch,
                      progress=False)
    tried = len(pipe.tuned["front"].points)
    print(f"{name}: {tried} settings tried on {len(captions)} captions\n  {tuned}")
    if options.certificate is not None and name == "unet":
        unseen = [scene.caption for scene in sample_scenes(24, 31, "heldout")]
        certify(pipe, unseen, tuned, batch=options.batch, progress=False).save(options.certificate)
        pipe.tuned["front"].plot().save(options.certificate / "front.png")
    rows = {key: row.summary() for key, row in compare(pipe, tuned, options.count, options.batch).items()}
    for key, row in rows.items():
        print(f"{key:29s} {row['speedup']:5.2f}x  {row['psnr']:5.1f} dB (least {row['least_psnr']:5.1f})")
    own = rows.pop("tuned")
    good = {key: row for key, row in rows.items() if row["psnr"] >= LIMIT}
    best = max(good, key=lambda key: good[key]["speedup"], default=None)
    alone = max((r["speedup"] for k, r in good.items() if r["settings"].startswith("exact")), default=0.0)
    promise = tuned.promise
    verdicts = {
        "caches alone, 2.0x at 30 dB": alone >= 2,
        "tune: as fast as the best set by hand": best is None or own["speedup"] >= good[best]["speedup"],
        "tune: mean of the unseen meets the promise": promise is not None and own["psnr"] >= LIMIT,
        "tune: and its bound": promise is not None and own["psnr"] >= promise.bound}
    print(f"best by hand at {LIMIT:g} dB: {best}" + ("" if best is None else f" ({good[best]['speedup']:.2f}x)"))
    for words, met in verdicts.items():
        print(f"target {words}: {'met' if met else 'missed'}")
    return {"tuned": own, "bound": None if promise is None else promise.bound, "tried": tried, "best": best,
            "verdicts": verdicts, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="unseen captions")
    parser.add_argument("--prompts", type=int, default=120, help="captions to tune on")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of each search")
    parser.add_argument("--batch", type=int, default=10, help="pictures a call")
    parser.add_argument("--networks", nargs="+", default=["unet", "dit"], choices=["unet", "dit"])
    parser.add_argument("--certificate", type=Path, default=None, help="folder for the tuned UNet's certificate")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    found = {name: network(name, options) for name in options.networks}
    if not options.no_write:
        print(write({**conditions("cpu"), "count": options.count, "limit": LIMIT, "networks": found}, "tune.json",
                    options.out))


if __name__ == "__main__":
    main()

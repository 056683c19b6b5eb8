"""What a faster setting changes, and the fastest that keeps a promise: a certificate, a search, a certificate again.

    python examples/certify_and_tune.py                       # the shipped model; the search takes --budget seconds
    python examples/certify_and_tune.py --model path/to/sd15 --prompts prompts.txt --budget 3600
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ldmfast
from ldmfast.caches import TaylorSeer
from ldmfast.testing.scenes import sample_scenes
from ldmfast.tuning import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a diffusers folder (default: the shipped model)")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line, for another model")
    parser.add_argument("--min-psnr", type=float, default=30.0)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds of the search")
    parser.add_argument("--count", type=int, default=48, help="captions, for the shipped model")
    parser.add_argument("--out", type=Path, default=Path("tuned"))
    options = parser.parse_args()
    if options.model is None:
        pipe = ldmfast.Pipeline.tiny()
        prompts = [scene.caption for scene in sample_scenes(options.count, 5, "heldout")]
    else:
        pipe = ldmfast.Pipeline.from_pretrained(options.model)
        prompts = options.prompts.read_text().splitlines()

    # a setting chosen by hand: what does it change, what does it save?
    print(pipe.certify(prompts[:4], Settings(cache=TaylorSeer(interval=3, on="output"))), end="\n\n")

    # the fastest setting that keeps a promise
    options.out.mkdir(parents=True, exist_ok=True)
    settings = pipe.tune(prompts, min_psnr=options.min_psnr, budget_s=options.budget,
                         path=options.out / "settings.json")
    print(settings, end="\n\n")

    # from now on pipe(prompt, settings="auto") uses it; its own certificate, with pictures
    report = pipe.certify(prompts[:4], "auto", seeds=1000)
    report.save(options.out)
    print(report)
    out = pipe(prompts[0], settings="auto", generator=0)
    out.save(options.out / "picture.png")
    assert out.report is not None
    print(f"promised: {out.report.promise}")


if __name__ == "__main__":
    main()

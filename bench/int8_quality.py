"""What 8 bits cost the shipped model: PSNR from the exact pictures of the same seeds, and attributes drawn right.

    python bench/int8_quality.py                # 512 held-out captions, 20 DDIM steps: some minutes
    python bench/int8_quality.py --count 50 --precision int8 fp8
    python bench/int8_quality.py --layers       # signal to quantisation noise of every layer, int8 and fp8

Printed: the mean and the least PSNR in dB, also of the first 50 captions, and the share of right attributes of both.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

import ldmfast
from ldmfast.quantization.measure import Meter
from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import judge
from ldmfast.testing.scenes import Scene, sample_scenes


def draw(precision: str, scenes: list[Scene]) -> Tensor:
    """(n, 3, 64, 64) in [-1, 1]; caption i starts from the noise of seed i."""
    pipe = ldmfast.Pipeline.tiny(precision=precision)
    out = pipe([scene.caption for scene in scenes], num_inference_steps=20, solver="ddim", output_type="np",
               generator=list(range(len(scenes))))
    return torch.as_tensor(out.images).permute(0, 3, 1, 2).float() * 2 - 1


def layers(captions: list[str]) -> None:
    """SQNR of every linear and convolution in dB, over all timesteps of these captions' pictures; fp8: linears only."""
    found = {}
    for form in ("int8", "int8_rows", "fp8"):
        pipe = ldmfast.Pipeline.tiny(precision="bf16")
        meter = Meter(pipe.unet, form)
        with meter.watching():
            for i, caption in enumerate(captions):
                pipe(caption, num_inference_steps=12, generator=i, output_type="latent", progress=False)
        found[form] = {name: row[0] for name, row in meter.sqnr([float("inf")]).items()}
    print(f"{'layer':70s} {'int8':>9s} {'int8 rows':>9s} {'fp8':>9s}")
    for name in sorted(found["int8"], key=lambda n: found["fp8"].get(n, 99.0)):
        print(f"{name:70s}" + "".join(f" {row[name]:9.1f}" if name in row else f" {'-':>9s}" for row in found.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512, help="captions")
    parser.add_argument("--precision", nargs="*", default=["int8"], choices=["bf16", "int8", "fp8"])
    parser.add_argument("--layers", action="store_true", help="the layers' SQNR over six captions, and nothing else")
    options = parser.parse_args()
    scenes = sample_scenes(6 if options.layers else options.count, 31, "heldout")
    if options.layers:
        layers([scene.caption for scene in scenes])
        return
    pictures = {precision: draw(precision, scenes) for precision in ("exact", *options.precision)}
    for precision in options.precision:
        psnr = 10 * torch.log10(4 / (pictures[precision] - pictures["exact"]).square().flatten(1).mean(1))
        for name, part in (("first 50", psnr[:50]), ("all", psnr)):
            print(f"PSNR of {precision}, {name}: mean {part.mean():.2f} dB, least {part.min():.2f} dB")
    for precision, drawn in pictures.items():
        rows: dict[str, list[bool]] = defaultdict(list)
        for verdict in judge(drawn, [expected_of(scene) for scene in scenes]):
            for attribute, right in verdict.items():
                rows[attribute].append(right)
        shares = {name: sum(values) / len(values) for name, values in rows.items()}
        print(f"{precision:6s} mean {sum(shares.values()) / len(shares):.2%}  "
              + "  ".join(f"{name} {share:.1%}" for name, share in shares.items()))


if __name__ == "__main__":
    main()

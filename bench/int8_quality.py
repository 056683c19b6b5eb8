"""What 8 bits cost the shipped model: PSNR from the exact pictures of the same seeds, and attributes drawn right.

    python bench/int8_quality.py                # 512 held-out captions, 20 DDIM steps: some minutes
    python bench/int8_quality.py --count 50

Printed: the mean and the least PSNR in dB, also of the first 50 captions, and the share of right attributes of both.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

import ldmfast
from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import judge
from ldmfast.testing.scenes import Scene, sample_scenes


def draw(precision: str, scenes: list[Scene]) -> Tensor:
    """(n, 3, 64, 64) in [-1, 1]; caption i starts from the noise of seed i."""
    pipe = ldmfast.Pipeline.tiny(precision=precision)
    out = pipe([scene.caption for scene in scenes], num_inference_steps=20, solver="ddim", output_type="np",
               generator=list(range(len(scenes))))
    return torch.as_tensor(out.images).permute(0, 3, 1, 2).float() * 2 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512, help="captions")
    scenes = sample_scenes(parser.parse_args().count, 31, "heldout")
    pictures = {precision: draw(precision, scenes) for precision in ("exact", "int8")}
    psnr = 10 * torch.log10(4 / (pictures["int8"] - pictures["exact"]).square().flatten(1).mean(1))
    for name, part in (("first 50", psnr[:50]), ("all", psnr)):
        print(f"PSNR of {name}: mean {part.mean():.2f} dB, least {part.min():.2f} dB")
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

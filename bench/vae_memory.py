"""Peak memory of one VAE decode, whole and in tiles: each measured in a process of its own.

    python bench/vae_memory.py                      # Stable Diffusion's VAE, 1024 px, ldmfast and diffusers in bf16
    python bench/vae_memory.py --size 512 768 1024

Random weights of the real shape. Memory is the peak resident size less what the process held before the call (weights,
libraries). The record goes to bench/results/<device>/vae-memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from arms import SD_VAE, random_model
from ops import conditions, write
from tqdm import tqdm

TILE = 64  # latents; diffusers' default for this VAE


def peak_mib() -> float:
    """The most that was resident so far."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def child(library: str, tiled: bool, size: int) -> dict[str, float]:
    import diffusers

    import ldmfast

    z = torch.randn(1, 4, size // 8, size // 8).bfloat16()
    vae = random_model(diffusers.AutoencoderKL, SD_VAE)
    if library == "ldmfast":
        ours = ldmfast.models.from_diffusers(vae, precision="bf16")
        call = lambda: ours.decode(z, tile=TILE if tiled else None)  # noqa: E731
    else:
        vae = vae.to(torch.bfloat16).to(memory_format=torch.channels_last)
        if tiled:
            vae.enable_tiling()
        call = lambda: vae.decode(z).sample  # noqa: E731
    with torch.inference_mode():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, start = peak_mib(), time.perf_counter()
        call()
    return {"seconds": round(time.perf_counter() - start, 3), "mib": round(peak_mib() - before, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[1024], help="pixels a side")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        library, tiled, size = options.child
        print(json.dumps(child(library, tiled == "tiles", int(size))))
        return
    rows = []
    work = [(library, kind, size) for size in options.size for library in ("ldmfast", "diffusers")
            for kind in ("whole", "tiles")]
    for library, kind, size in tqdm(work, unit="decode", leave=False):
        command = [sys.executable, __file__, "--child", library, kind, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"library": library, "kind": kind, "size": size, **json.loads(done.stdout.splitlines()[-1])})
    for row in rows:
        print("{size:5d} px  {library:9s} {kind:5s}  {mib:8.1f} MiB  {seconds:7.2f} s".format(**row))
    if not options.no_write:
        record = {**conditions("cpu"), "vae": "Stable Diffusion, bf16", "tile": TILE, "rows": rows}
        print(f"written to {write(record, 'vae-memory.json')}")


if __name__ == "__main__":
    main()

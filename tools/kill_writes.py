"""Kills ldmfast with SIGKILL while it writes, and looks at what is on the disk.

    python tools/kill_writes.py --count 100              # instants of each kind of write

For each kind of write (converting a file, a folder into a file, a file into a folder, a folder into a folder; storing
an int8 network; saving a picture) a child process writes and is killed after a part of the time that a whole run takes,
at instants spread evenly over it. What stands under the final name must be nothing, or the whole result byte for byte
(or, where a file is replaced, the one that was there before). Prints a line for each kind: how many children were
killed before they had finished, how many left a temporary behind (those died in the middle of writing), and how many
left a half file, which must be 0: otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from ldmfast import checkpoints  # noqa: E402
from ldmfast.checkpoints.convert import convert  # noqa: E402
from ldmfast.models import AutoencoderKL, UNet2DCondition  # noqa: E402
from ldmfast.pipelines.output import save_png  # noqa: E402
from ldmfast.quantization import Plan, store  # noqa: E402

TINY = ROOT / "ldmfast" / "assets" / "tiny"
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [64, 64, 128, 128], "layers_per_block": 2,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


@dataclass(frozen=True)
class Write:
    """run(target) writes. before: what stands under the name when it begins, where it is replaced."""

    name: str
    target: str
    run: Callable[[Path], object]
    before: bytes | None = None


def sources(folder: Path) -> list[Write]:
    torch.manual_seed(0)
    save_file({str(i): torch.randn(1 << 18) for i in range(24)}, folder / "file.safetensors")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(VAE))
    vae = AutoencoderKL.from_config(VAE).state_dict()
    save_file({k: v.contiguous() for k, v in vae.items()}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    convert(folder / "vae", folder / "vae.safetensors", progress=False)
    parts = checkpoints.open_folder(TINY / "unet")
    unet = UNet2DCondition.from_weights(parts.config("model"), parts.weights("model", torch.float32))
    picture = Image.effect_noise((320, 320), 80).convert("RGB")
    return [
        Write("file to file", "a.safetensors",
              lambda t: convert(folder / "file.safetensors", t, dtype="bfloat16", progress=False)),
        Write("folder to file", "b.safetensors", lambda t: convert(folder / "vae", t, progress=False)),
        Write("file to folder", "c", lambda t: convert(folder / "vae.safetensors", t, dtype="float16", progress=False)),
        Write("folder to folder", "d", lambda t: convert(TINY, t, dtype="float32", progress=False)),
        Write("int8 network", store.NAME, lambda t: store.save(t, unet, Plan(), "0"), b"before"),
        Write("picture", "e.png", lambda t: save_png(picture, t, {"seed": 0}), b"before"),
    ]


def digest(target: Path) -> str:
    """Of everything under a name, "" if there is nothing."""
    if not target.exists():
        return ""
    files = sorted(f for f in target.rglob("*") if f.is_file()) if target.is_dir() else [target]
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(target.parent)}:{file.stat().st_size};".encode() + file.read_bytes())
    return found.hexdigest()


def child(write: Write, target: Path, after: float | None) -> tuple[float, bool]:
    """Runs the write in a child, killed after some seconds. Returns its seconds, and whether it was killed in time."""
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        try:
            write.run(target)
            os._exit(0)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(max(start + after - time.perf_counter(), 0))
        os.kill(pid, signal.SIGKILL)
    _, code = os.waitpid(pid, 0)
    status = os.waitstatus_to_exitcode(code)
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"{write.name}: the write itself failed ({status})")
    return time.perf_counter() - start, status != 0


def trial(write: Write, folder: Path, after: float | None) -> tuple[float, bool, int, str]:
    """(seconds, killed, files left beside the target, digest of the target) in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    target = folder / write.target
    if write.before is not None:
        target.write_bytes(write.before)
    seconds, killed = child(write, target, after)
    return seconds, killed, sum(f != target for f in folder.iterdir()), digest(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="instants of each kind (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    broken = 0
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        (Path(name) / "from").mkdir()
        for write in sources(Path(name) / "from"):
            broken += report(write, Path(name) / "to", args.count)
    return 1 if broken else 0


def report(write: Write, folder: Path, count: int) -> int:
    whole = [trial(write, folder, None) for _ in range(3)]
    seconds, expected = max(t for t, *_ in whole), whole[0][3]
    before = ""
    if write.before is not None:
        (folder / write.target).write_bytes(write.before)
        before = digest(folder / write.target)
    if not expected or any(d != expected for *_, d in whole):
        raise SystemExit(f"{write.name}: does not write the same twice, so that a half file could not be told")
    early = left = half = 0
    for i in range(count):
        _, killed, beside, found = trial(write, folder, seconds * (i + 0.5) / count)
        early, left, half = early + killed, left + (beside > 0), half + (found not in (expected, before))
    print(f"{write.name:<17} {count} instants over {seconds:.3f} s: {early} killed before the end, {left} with a "
          f"temporary left, {half} half files", flush=True)
    return half


if __name__ == "__main__":
    raise SystemExit(main())

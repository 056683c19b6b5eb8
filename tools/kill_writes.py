"""Kills ldmfast with SIGKILL while it writes, and looks at what is on the disk.

    python tools/kill_writes.py --count 100              # instants of each kind of write

For each kind of write (converting a file, a folder into a file, a file into a folder, a folder into a folder; storing
an int8 network; saving a picture) a new interpreter says when its write begins, and is killed after a part of the time
that a whole write takes from there, at instants spread evenly over it. What stands under the final name must be
nothing, or the whole result byte for byte (or, where a file is replaced, the one that was there before). Prints a line
for each kind: how many writers were killed before they had finished, how many of them left a temporary behind (those
died in the middle of writing), and how many left a half file. The exit status is 1 where a half file was found, and
where no writer died in the middle, since nothing was tried then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = ROOT / "ldmfast" / "assets" / "tiny"
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [64, 64, 128, 128], "layers_per_block": 2,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
BEGIN = b"begin\n"
LIMIT = 600.0  # seconds that a writer may take to begin, and again to end
WRITES = {"file to file": "a.safetensors", "folder to file": "b.safetensors", "file to folder": "c",
          "folder to folder": "d", "int8 network": "ldmfast_int8.safetensors", "picture": "e.png"}
REPLACED = ("int8 network", "picture")


@dataclass(frozen=True)
class Write:
    """command, given the target's path, prints BEGIN, writes, closes stdout, and exits with 0.

    before: what stands under the name when it begins, where it is replaced.
    """

    name: str
    target: str
    command: tuple[str, ...]
    before: bytes | None = None


@dataclass(frozen=True)
class Report:
    """Of the instants of one kind: writers killed before their end, of those the ones that left a temporary, and files
    that are neither whole nor the one before."""

    killed: int
    inside: int
    half: int

    @property
    def holds(self) -> bool:
        return self.half == 0 and self.inside > 0


def sources(folder: Path) -> list[Write]:
    """Makes what is read, in ``folder``."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from ldmfast.checkpoints.convert import convert
    from ldmfast.models import AutoencoderKL

    torch.manual_seed(0)
    save_file({str(i): torch.randn(1 << 18) for i in range(24)}, folder / "file.safetensors")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(VAE))
    vae = AutoencoderKL.from_config(VAE).state_dict()
    save_file({k: v.contiguous() for k, v in vae.items()}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    convert(folder / "vae", folder / "vae.safetensors", progress=False)
    Image.effect_noise((320, 320), 80).convert("RGB").save(folder / "picture.png")
    command = (sys.executable, str(Path(__file__).resolve()), "--from", str(folder), "--write")
    return [Write(name, target, (*command, name), b"before" if name in REPLACED else None)
            for name, target in WRITES.items()]


def writer(name: str, folder: Path) -> Callable[[Path], object]:
    """The write of that name, with everything that comes before it done."""
    import torch

    torch.set_num_threads(1)
    if name == "picture":
        from PIL import Image

        from ldmfast.pipelines.output import save_png
        picture = Image.open(folder / "picture.png")
        picture.load()
        return lambda t: save_png(picture, t, {"seed": 0})
    if name == "int8 network":
        from ldmfast import checkpoints
        from ldmfast.models import UNet2DCondition
        from ldmfast.quantization import Plan, store
        parts = checkpoints.open_folder(TINY / "unet")
        unet = UNet2DCondition.from_weights(parts.config("model"), parts.weights("model", torch.float32))
        return lambda t: store.save(t, unet, Plan(), "0")
    from ldmfast.checkpoints.convert import convert
    source, dtype = {
        "file to file": (folder / "file.safetensors", "bfloat16"), "folder to file": (folder / "vae", None),
        "file to folder": (folder / "vae.safetensors", "float16"), "folder to folder": (TINY, "float32")}[name]
    return lambda t: convert(source, t, dtype=dtype, progress=False)


def digest(target: Path) -> str:
    """Of everything under a name, "" if there is nothing."""
    if not target.exists():
        return ""
    files = sorted(f for f in target.rglob("*") if f.is_file()) if target.is_dir() else [target]
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(target.parent)}:{file.stat().st_size};".encode() + _ordered(file.read_bytes()))
    return found.hexdigest()


def _ordered(data: bytes) -> bytes:
    """With a safetensors header's keys in order: its own writer shuffles the metadata from one process to the next."""
    stop = 8 + int.from_bytes(data[:8], "little")
    try:
        return json.dumps(json.loads(data[8:stop]), sort_keys=True).encode() + data[stop:]
    except ValueError:
        return data


def run(write: Write, target: Path, after: float | None) -> tuple[float, bool]:
    """Runs the write in a new interpreter, killed ``after`` seconds from its beginning (None: not).

    Returns the seconds from there to its end, and whether it was killed in time."""
    with subprocess.Popen([*write.command, str(target)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], LIMIT)
            start = time.perf_counter()
            if not ready or process.stdout.readline() != BEGIN:
                raise SystemExit(f"{write.name}: the writer did not begin within {LIMIT:.0f} s")
            select.select([process.stdout], [], [], LIMIT if after is None else after)
            seconds = time.perf_counter() - start
            if after is not None:
                process.kill()
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{write.name}: the writer did not end within {LIMIT:.0f} s") from None
        finally:
            process.kill()
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"{write.name}: the write itself failed ({status})")
    return seconds, status != 0


def trial(write: Write, folder: Path, after: float | None) -> tuple[float, bool, bool, str]:
    """(seconds, killed, whether a temporary is left beside the target, digest of the target) in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    target = folder / write.target
    if write.before is not None:
        target.write_bytes(write.before)
    seconds, killed = run(write, target, after)
    return seconds, killed, any(f != target for f in folder.iterdir()), digest(target)


def report(write: Write, folder: Path, count: int) -> Report:
    whole = [trial(write, folder, None) for _ in range(2)]
    seconds, expected = max(t for t, *_ in whole), whole[0][3]
    before = ""
    if write.before is not None:
        (folder / write.target).write_bytes(write.before)
        before = digest(folder / write.target)
    if expected in ("", before) or any(d != expected for *_, d in whole):
        raise SystemExit(f"{write.name}: does not write the same twice, so that a half file could not be told")
    tried = [trial(write, folder, seconds * (i + 0.5) / count) for i in range(count)]
    found = Report(killed=sum(killed for _, killed, *_ in tried),
                   inside=sum(killed and left for _, killed, left, _ in tried),
                   half=sum(after not in (expected, before) for *_, after in tried))
    print(f"{write.name:<17} {count} instants over {seconds:.3f} s: {found.killed} killed before the end, "
          f"{found.inside} in the middle (with a temporary left), {found.half} half files"
          + ("" if found.inside else ": NOTHING WAS TRIED"), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="instants of each kind (default %(default)s)")
    parser.add_argument("--write", choices=WRITES, help=argparse.SUPPRESS)  # this and what follows: of the writers
    parser.add_argument("--from", dest="source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("target", nargs="?", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        act = writer(args.write, args.source)
        with tempfile.TemporaryDirectory(dir=args.source) as rehearsal:  # what is imported late belongs to no write
            act(Path(rehearsal) / args.target.name)
        os.write(1, BEGIN)
        act(args.target)
        os.close(1)  # taking torch down belongs to no write either
        os._exit(0)
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        (Path(name) / "from").mkdir()
        reports = [report(write, Path(name) / "to", args.count) for write in sources(Path(name) / "from")]
    return 0 if all(r.holds for r in reports) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Kills ldmfast with SIGKILL while it writes, and looks at what is on the disk.

    python tools/kill_writes.py --count 100              # instants of each kind of write

For each kind of write (converting a file, a folder into a file, a file into a folder, a folder into a folder; storing
an int8 network; saving a picture) a forked process says when its write begins, and is killed after a part of the time
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
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = ROOT / "ldmfast" / "assets" / "tiny"
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [64, 64, 128, 128], "layers_per_block": 2,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
BEGIN = b"begin\n"
_STRIDE = 37  # instants in an order that meets early and late ones in turn (for counts that it does not divide)
LIMIT = 600.0  # seconds that a writer may take to begin, and again to end
WRITES = {"file to file": "a.safetensors", "folder to file": "b.safetensors", "file to folder": "c",
          "folder to folder": "d", "int8 network": "ldmfast_int8.safetensors", "picture": "e.png"}
REPLACED = ("int8 network", "picture")


@dataclass(frozen=True)
class Write:
    """act, given the target's path, writes it, in a process of its own.

    before: what stands under the name when it begins, where it is replaced.
    """

    name: str
    target: str
    act: Callable[[Path], object]
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
    writes = [Write(name, target, writer(name, folder), b"before" if name in REPLACED else None)
              for name, target in WRITES.items()]
    for write in writes:  # what is imported late belongs to no write
        with tempfile.TemporaryDirectory(dir=folder) as rehearsal:
            write.act(Path(rehearsal) / write.target)
    return writes


def writer(name: str, folder: Path) -> Callable[[Path], object]:
    """The write of that name, with everything that comes before it done."""
    import torch

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


def start(write: Write, target: Path) -> tuple[int, int]:
    """A process that prints BEGIN into a pipe, writes, and ends: its id, and the pipe's other end."""
    source, sink = os.pipe()
    process = os.fork()
    if process:
        os.close(sink)
        return process, source
    status = 1
    try:
        import torch

        torch.set_num_threads(1)  # threads of a pool are not there after a fork
        os.close(source)
        os.write(sink, BEGIN)
        write.act(target)
        os.close(sink)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run(write: Write, target: Path, after: float | None) -> tuple[float, bool]:
    """Runs the write in a process of its own, killed ``after`` seconds from its beginning (None: not).

    Returns the seconds from there to its end, and whether it was killed in time."""
    process, pipe = start(write, target)
    ended, late = False, ""
    try:
        ready, _, _ = select.select([pipe], [], [], LIMIT)
        begin = time.perf_counter()
        if not ready or os.read(pipe, len(BEGIN)) != BEGIN:
            late = "begin"
        else:
            ended = bool(select.select([pipe], [], [], LIMIT if after is None else after)[0])
            late = "" if ended or after is not None else "end"
        seconds = time.perf_counter() - begin
    finally:
        if not ended or after is not None:
            os.kill(process, signal.SIGKILL)
        os.close(pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if late:
        raise SystemExit(f"{write.name}: the writer did not {late} within {LIMIT:.0f} s")
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
    whole = [trial(write, folder, None) for _ in range(3)]
    expected = whole[0][3]
    before = ""
    if write.before is not None:
        (folder / write.target).write_bytes(write.before)
        before = digest(folder / write.target)
    if expected in ("", before) or any(d != expected for *_, d in whole):
        raise SystemExit(f"{write.name}: does not write the same twice, so that a half file could not be told")
    tried, times = [], [t for t, *_ in whole]
    for i in range(count):
        if i % 5 == 4:  # what else the machine does changes, and with it how long a write takes
            times.append(trial(write, folder, None)[0])
        seconds = sorted(times[-3:])[1]
        tried.append(trial(write, folder, seconds * (i * _STRIDE % count + 0.5) / count))
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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        (Path(name) / "from").mkdir()
        reports = [report(write, Path(name) / "to", args.count) for write in sources(Path(name) / "from")]
    return 0 if all(r.holds for r in reports) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Damages checkpoints at random and watches what ldmfast does with them.

    python tools/fuzz_checkpoints.py safetensors --count 200000      # or gguf (20000 asked), or json (10000 asked)
    python tools/fuzz_checkpoints.py json --only 4711                # one case again, with its traceback

Every case is made from (kind, seed, number) alone, so a number that is reported can be repeated. A case passes if the
file is read, or refused with an LdmfastError of one line that names it; if it takes at most one CPU second; and if a
refusal costs at most 32 MiB over what was resident before. Cases run in child processes, 500 each, so that a crash is
seen and named. The state is kept in --state after every 500: a run goes on from there, after it has tried again what
failed. The last line printed holds the counts, and the exit status is 1 if any case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "checkpoints")]

import gguf_files  # noqa: E402

from ldmfast import checkpoints  # noqa: E402
from ldmfast.checkpoints import safetensors as reader  # noqa: E402
from ldmfast.checkpoints import to_ldm  # noqa: E402
from ldmfast.checkpoints.open_file import open_file  # noqa: E402
from ldmfast.errors import LdmfastError  # noqa: E402
from ldmfast.models import REGISTRY  # noqa: E402
from ldmfast.pipelines import load as pipeline_parts  # noqa: E402
from ldmfast.samplers import Schedule  # noqa: E402

CHUNK = 500
SECONDS, HANG = 1.0, 60  # CPU seconds of a case; wall seconds after which it is interrupted
MIB = 32 << 20
TINY = ROOT / "ldmfast" / "assets" / "tiny"
Rng = np.random.Generator
Act = Callable[[], object]

NUMBERS = [0, 1, -1, 2, 7, 255, 256, 65535, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, (1 << 62) - 1, 1 << 62, 1 << 63,
           (1 << 64) - 1, 10 ** 30, 0.5, -0.0, 1e-300, 1e300, float("inf"), float("nan")]
TEXTS = ["", "a", "..", "../x", "/etc/hosts", "a\0b", "\n", "é" * 40, "x" * 5000, "\ud800", "F32", "silu", "None",
         "%s{}"]


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def any_json(rng: Rng, depth: int = 0) -> Any:
    kind = int(rng.integers(9 if depth < 3 else 6))
    if kind < 6:
        return [None, True, False, pick(rng, NUMBERS), pick(rng, TEXTS), int(rng.integers(-4, 600))][kind]
    if kind == 6:
        return {str(pick(rng, TEXTS)): any_json(rng, depth + 1) for _ in range(int(rng.integers(4)))}
    return [any_json(rng, depth + 1) for _ in range(int(rng.integers(5)))]


def damage_bytes(rng: Rng, data: bytes, within: int) -> bytes:
    """One to four edits in the first ``within`` bytes; now and then the file is cut."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(max(min(within, len(out)), 1)))
        kind, new = int(rng.integers(6)), rng.bytes(int(rng.integers(1, 9)))
        if kind == 0:
            out[at:at + len(new)] = new
        elif kind == 1:
            del out[at:at + int(rng.integers(1, 64))]
        elif kind == 2:
            out[at:at] = new
        elif kind == 3 and out:
            out[at % len(out)] ^= 1 << int(rng.integers(8))
        elif kind == 4:
            other = int(rng.integers(max(len(out), 1)))
            out[at:at + 8] = out[other:other + 8]
        else:
            out[at:at + 8] = struct.pack("<Q", int(pick(rng, NUMBERS[:16])) % (1 << 64))
    return bytes(out[:int(rng.integers(len(out) + 1))]) if rng.random() < 0.15 else bytes(out)


def damage_json(rng: Rng, value: Any) -> Any:
    """A copy with one to three values replaced, removed, added or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(int(rng.integers(1, 4))):
        places: list[tuple[Any, Any]] = []

        def walk(node: Any, places: list[tuple[Any, Any]] = places) -> None:
            for key in (list(node) if isinstance(node, dict) else range(len(node))):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    walk(node[key])

        if not isinstance(value, (dict, list)):
            return value
        walk(value)
        if not places or rng.random() < 0.03:
            return any_json(rng)
        node, key = pick(rng, places)
        kind = int(rng.integers(6))
        if kind < 3:
            node[key] = any_json(rng)
        elif kind == 3:
            node[key] = pick(rng, NUMBERS)
        elif kind == 4:
            del node[key]
        elif isinstance(node, dict):
            node[str(pick(rng, TEXTS))] = any_json(rng)
        else:
            node.insert(int(rng.integers(len(node) + 1)), any_json(rng))
    return value


def header_of(entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None = None) -> dict[str, Any]:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in entries.items():
        size = reader.DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header


def compvis_header() -> dict[str, Any]:
    """A whole model in CompVis layout, reduced: its data is a hole in the file."""
    unet = {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 64}
    vae = {"block_out_channels": [32, 64], "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 2,
           "up_block_types": ["UpDecoderBlock2D"] * 2}
    entries: dict[str, tuple[str, list[int]]] = {}
    for kind, name, config, prefix in (("unet", "UNet2DConditionModel", unet, "model.diffusion_model."),
                                       ("vae", "AutoencoderKL", vae, "first_stage_model.")):
        with torch.device("meta"):
            state = REGISTRY[name][1].from_config(config).state_dict()
        layout = to_ldm.Layout.of(state)
        for own, tensor in state.items():
            placed = to_ldm.rename(kind, own, layout)
            entries[prefix + placed.name] = "F16", list(placed.shape(tuple(tensor.shape)))
    text = "cond_stage_model.transformer.text_model."
    entries[text + "embeddings.token_embedding.weight"] = "F16", [99, 64]
    entries[text + "embeddings.position_embedding.weight"] = "F16", [77, 64]
    entries[text + "encoder.layers.0.mlp.fc1.weight"] = "F16", [256, 64]
    return header_of(entries, {"format": "pt", "modelspec.prediction_type": "epsilon"})


def other_model(rng: Rng, header: dict[str, Any]) -> dict[str, Any]:
    """A header that fits its data again, with names, shapes and dtypes changed: the lies that only inference sees."""
    entries = {k: (v["dtype"], list(v["shape"])) for k, v in header.items() if k != "__metadata__"}
    for _ in range(int(rng.integers(1, 5))):
        name = pick(rng, list(entries)) if entries else "a"
        dtype, shape = entries.pop(name, ("F32", [1]))
        kind = int(rng.integers(6))
        if kind == 0 and shape:
            shape[int(rng.integers(len(shape)))] = int(rng.integers(0, 400))
        elif kind == 1:
            shape = [int(n) for n in rng.integers(0, 5, int(rng.integers(6)))]
        elif kind == 2:
            dtype = str(pick(rng, list(reader.DTYPES)))
        elif kind == 3:
            words = name.split(".")
            words[int(rng.integers(len(words)))] = pick(rng, ["0", "1", "7", "99999999", "weight", "bias", "", "x"])
            name = ".".join(words)
        elif kind == 4:
            continue
        entries[name] = dtype, shape
    return header_of(entries, {"format": "pt", "modelspec.resolution": str(pick(rng, TEXTS))[:9]})


class Bases:
    """Sound files that the cases are made from, built once."""

    def __init__(self) -> None:
        mixed = {"a.weight": ("F32", [2, 3, 4]), "b": ("I64", []), "c": ("BF16", [7]), "empty": ("F16", [0, 3]),
                 "f.weight": ("F8_E4M3", [4, 4]), "f.scale_weight": ("F32", []), "später/ñ": ("F64", [2]),
                 "d": ("BOOL", [3])}
        with torch.device("meta"):
            torch.nn.Embedding(2, 2)  # torch imports half of itself at the first one, for 1.8 CPU seconds
        self.headers = [header_of(mixed, {"format": "pt", "note": "x" * 300}), header_of({}),
                        header_of({"w": ("F32", [8])}), compvis_header()]
        block = np.zeros
        model = {"in": (0, (2, 3), np.ones(6, np.float32)), "q.weight": (8, (4, 64), block(8 * 34, np.uint8)),
                 "k": (12, (2, 256), block(2 * 144, np.uint8)), "h": (1, (3,), np.ones(3, np.float16)),
                 "n": (26, (2, 2, 1, 1), np.ones(4, np.int32)), "i": (16, (1, 256), block(66, np.uint8))}
        keys: list[tuple[str, Any]] = [
            ("general.architecture", "sd1"), ("comfy.gguf.orig_shape.q.weight", ("i", [8, 32])),
            ("many", ("f", [0.5] * 40)), ("words", ["a", "bc", ""]), ("flag", ("?", True)),
            ("big", ("Q", 1 << 63)), ("long", "t" * 400)]
        self.ggufs = [gguf_files.model(model, keys), gguf_files.model(model, keys, 64), gguf_files.file([], [])]
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.work = self.folder / "tiny"
        shutil.copytree(TINY, self.work)
        names = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
                 "model_index.json", "ldmfast.json")
        self.configs = {n: json.loads((TINY / n).read_text()) for n in names}
        weights = open_file(TINY / "vae" / "diffusion_pytorch_model.safetensors").tensors
        mapping = dict.fromkeys(list(weights)[:20], "part.safetensors")
        self.configs["vae/diffusion_pytorch_model.safetensors.index.json"] = {"metadata": {}, "weight_map": mapping}


def read_all(path: Path) -> None:
    file = open_file(path)
    if sum(t.nbytes for t in file.tensors.values()) < 1 << 20:
        for name, tensor in file.read():
            assert tuple(tensor.shape) == file.tensors[name].shape
        for name, tensor in file.read(dtype=torch.bfloat16, mapped=False):
            assert tuple(tensor.shape) == file.tensors[name].shape
    if len(file.tensors) > 20:  # the reduced model, whose parts and configs are inferred; its data is never read
        parts = checkpoints.open_single_file(path)
        for part in parts.names:
            parts.config(part)
            if parts.sources(part):
                parts.tensors(part)


def safetensors_case(rng: Rng, bases: Bases) -> Act:
    header = bases.headers[int(rng.choice(4, p=[0.5, 0.05, 0.25, 0.2]))]
    how = rng.random()
    consistent = how > 0.7
    if consistent:
        header = other_model(rng, header)
    size = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    made = json.dumps(damage_json(rng, header) if how < 0.4 else header, separators=(",", ":"))
    text = made.encode("utf-8", "surrogatepass")
    content = len(text).to_bytes(8, "little") + text
    if 0.3 <= how <= 0.7:
        content = damage_bytes(rng, content, len(content) if how < 0.65 else 8)
    if rng.random() < (0.02 if consistent else 0.1):
        size = int(pick(rng, [0, 1, size - 1, size + 1, 300 << 20])) % (1 << 40)
    path = bases.folder / "x.safetensors"
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + max(size, 0))
    return lambda: read_all(path)


def gguf_case(rng: Rng, bases: Bases) -> Act:
    content = pick(rng, bases.ggufs)
    content = damage_bytes(rng, content, len(content) if rng.random() < 0.8 else 32)
    path = bases.folder / "x.gguf"
    path.write_bytes(b"GGUF" + content[4:] if rng.random() < 0.9 else content)
    return lambda: read_all(path)


def json_case(rng: Rng, bases: Bases) -> Act:
    name = str(rng.choice(list(bases.configs), p=[0.35, 0.2, 0.2, 0.1, 0.05, 0.05, 0.05]))
    made = bases.configs[name]
    value = damage_json(rng, made) if rng.random() < 0.85 else made
    content = json.dumps(value, indent=1).encode("utf-8", "surrogatepass")
    if value is made:
        content = damage_bytes(rng, content, len(content))
    target = bases.work / name
    target.write_bytes(content)
    weights = bases.work / "vae" / "diffusion_pytorch_model.safetensors"

    def act() -> None:
        try:
            if name.endswith(".index.json"):
                weights.rename(weights.with_name("part.safetensors"))
            open_parts(bases.work, name.split("/")[0])
        finally:
            if name.endswith(".index.json"):
                weights.with_name("part.safetensors").rename(weights)
                target.unlink()
            else:
                shutil.copyfile(TINY / name, target)
    return act


def open_parts(folder: Path, part: str) -> None:
    """What Pipeline.from_pretrained does with the part whose config was changed, or with the indices alone."""
    parts = checkpoints.open_folder(folder)
    cpu = torch.device("cpu")
    if part in ("unet", "vae", "text_encoder"):
        pipeline_parts._model(parts, part, torch.float32, cpu)
    elif part == "scheduler":
        Schedule.from_config(pipeline_parts._scheduler_config(parts))
    else:
        pipeline_parts.read_defaults(Path(parts.path))
        Schedule.from_config(pipeline_parts._scheduler_config(parts))
        for name in parts.names:
            parts.folder(name)
            if name in ("unet", "vae"):
                REGISTRY.get(parts.config(name).get("_class_name") or parts.class_name(name))


CASES = {"safetensors": safetensors_case, "gguf": gguf_case, "json": json_case}
SALT = {"safetensors": 1, "gguf": 2, "json": 3}


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def interrupted(*_: Any) -> None:
    raise TimeoutError(f"still running after {HANG} s")


def run_case(kind: str, seed: int, number: int, bases: Bases, show: bool = False) -> str:
    """"read", "refused", or what went wrong."""
    act = CASES[kind](np.random.default_rng([seed, SALT[kind], number]), bases)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    before, start = status("VmRSS"), time.process_time()
    signal.alarm(HANG)
    outcome = "read"
    try:
        act()
    except LdmfastError as error:
        outcome = "refused" if len(str(error).splitlines()) == 1 else f"refused in {len(str(error).splitlines())} lines"
    except BaseException as error:
        if show:
            traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    finally:
        signal.alarm(0)
    seconds, grown = time.process_time() - start, status("VmHWM") - before
    if outcome in ("read", "refused") and seconds > SECONDS:
        return f"{seconds:.1f} CPU seconds"
    return f"{grown / 2**20:.0f} MiB for a refusal" if outcome == "refused" and grown > MIB else outcome


def run_chunk(kind: str, seed: int, numbers: range, bases: Bases) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Outcomes of the cases, run in a child; a case that kills it is named and the rest goes on."""
    counts: Counter[str] = Counter()
    failed: list[tuple[int, str]] = []
    first = numbers.start
    while first < numbers.stop:
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(source)
            signal.signal(signal.SIGALRM, interrupted)
            with os.fdopen(sink, "w") as out:
                for number in range(first, numbers.stop):
                    out.write(f"{number}\t{run_case(kind, seed, number, bases)}\n")
                    out.flush()
            os._exit(0)
        os.close(sink)
        with os.fdopen(source) as lines:
            for line in lines:
                number, outcome = line.rstrip("\n").split("\t")
                first = int(number) + 1
                counts[outcome if outcome in ("read", "refused") else "failed"] += 1
                if outcome not in ("read", "refused"):
                    failed.append((int(number), outcome))
        _, code = os.waitpid(child, 0)
        if code:
            counts["failed"] += 1
            failed.append((first, f"the process died ({os.waitstatus_to_exitcode(code)})"))
            first += 1
    return counts, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(CASES))
    parser.add_argument("--count", type=int, default=CHUNK, help="cases in all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other cases (default %(default)s)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run this case alone and show its traceback")
    parser.add_argument("--state", type=Path, help="where counts are kept (default build/fuzz-KIND-SEED.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bases = Bases()
    try:
        if args.only is not None:
            signal.signal(signal.SIGALRM, interrupted)
            print(run_case(args.kind, args.seed, args.only, bases, show=True))
            return 0
        return campaign(args, bases)
    finally:
        shutil.rmtree(bases.folder)


def campaign(args: argparse.Namespace, bases: Bases) -> int:
    state = args.state or ROOT / "build" / f"fuzz-{args.kind}-{args.seed}.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(state.read_text()) if state.exists() else {"done": 0, "counts": {}, "failed": []}
    counts, begin = Counter(kept["counts"]), time.monotonic()
    again, kept["failed"], counts["failed"] = kept["failed"], [], 0
    for number, _ in again:  # what failed before a change may not fail any more
        found, failed = run_chunk(args.kind, args.seed, range(number, number + 1), bases)
        counts, kept["failed"] = counts + found, kept["failed"] + failed
    kept["counts"] = dict(counts)
    for first in range(kept["done"], args.count, CHUNK):
        stop = min(first + CHUNK, args.count)
        found, failed = run_chunk(args.kind, args.seed, range(first, stop), bases)
        counts += found
        kept = {"done": stop, "counts": dict(counts), "failed": kept["failed"] + failed}
        part = state.with_suffix(".part")
        part.write_text(json.dumps(kept))
        os.replace(part, state)
        print(f"\r{args.kind}: {stop} of {args.count}, {time.monotonic() - begin:.0f} s, {counts['failed']} failed",
              end="", file=sys.stderr, flush=True)
    state.write_text(json.dumps(kept))
    print(file=sys.stderr)
    for outcome, number in Counter(what for _, what in kept["failed"]).most_common(30):
        example = next(n for n, what in kept["failed"] if what == outcome)
        print(f"  {number} x {outcome}, for instance --only {example}")
    print(f"{args.kind}: {kept['done']} cases of seed {args.seed}: {counts['read']} read, {counts['refused']} refused, "
          f"{counts['failed']} failed")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

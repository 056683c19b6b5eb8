"""Many different calls of one loaded model: from threads, or of random sizes one after another.

    python tools/many_calls.py threads                  # 64 threads, 20 calls each, compared bit for bit with serial
    python tools/many_calls.py shapes                   # 200 calls of random height, width, batch and steps
    ... --model tiny | accelerated | diffusers          # Pipeline.tiny(), or the same folder in diffusers, accelerated

threads: all call one object (in diffusers two: image to image has a pipeline of its own, around the same parts, the
scheduler and tokenizer included). --model diffusers calls them as they are, and counts what goes wrong.

shapes: after a warm-up with the largest of these calls and a quarter of the others, no network may be built and no
weight packed, and resident memory may not grow by more than 1 MiB. It is measured twice: as it is, and after
malloc_trim(0), which leaves out freed pages that the allocator has kept. torch and oneDNN keep a compiled primitive for
every new size of a product, up to 1024 each, of 0.6 MiB in bf16: memory grows by that, whoever calls. So that growth of
ldmfast can be seen beside it both caches are set to one entry; --torch-caches leaves them as they are.

The exit status is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--torch-caches" not in sys.argv and "shapes" in sys.argv:  # read when torch is loaded
    os.environ |= {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ldmfast  # noqa: E402
from ldmfast.models import gemm, onednn  # noqa: E402
from ldmfast.models.base import Model  # noqa: E402

TINY = ROOT / "ldmfast" / "assets" / "tiny"
PROMPTS = ("a red circle above a blue square", "three yellow rings", "a purple triangle on a gray background")
SOLVERS = ("ddim", "euler", "dpmpp_2m", "unipc", "heun", "euler_a", "lms", "deis")
MIB = 1 << 20
Draw = Callable[..., np.ndarray]


def native(precision: str) -> Draw:
    pipe = ldmfast.Pipeline.tiny(precision=precision)

    def draw(i: int, prompt: list[str], **call: Any) -> np.ndarray:
        extra: dict[str, Any] = {"solver": SOLVERS[i % 8], "prompt_weighting": i % 3 == 1}
        if "image" in call and i % 10 == 4:
            extra["mask_image"] = Image.linear_gradient("L").resize((64, 64))
        return pipe(prompt, **call, **extra, generator=i, progress=False).images
    return draw


def diffusers(precision: str, accelerate: bool = True) -> Draw:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    text = StableDiffusionPipeline.from_pretrained(TINY)
    image = StableDiffusionImg2ImgPipeline(**text.components)
    for pipe in (text, image):
        pipe.set_progress_bar_config(disable=True)
        if accelerate:
            ldmfast.accelerate(pipe, precision=precision)

    def draw(i: int, prompt: list[str], **call: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(i)
        if "image" in call:
            call = {k: v for k, v in call.items() if k not in ("height", "width")}
            call["image"] = call["image"].resize((64, 64))
            return image(prompt, **call, generator=generator).images
        return text(prompt, **call, generator=generator).images
    return draw


def mixed(i: int) -> dict[str, Any]:
    """Call i: prompts of a batch of 1 or 2, size, steps, guidance, every fifth from a picture."""
    call: dict[str, Any] = {"prompt": list(PROMPTS[i % 3:][:1 + i % 2]), "height": (64, 72, 96)[i % 3],
                            "width": (64, 80)[i % 4 == 1], "num_inference_steps": 2 + i % 3,
                            "guidance_scale": (1.0, 4.0)[i % 7 > 1], "output_type": "np"}
    if i % 5 == 4:
        call |= {"image": Image.radial_gradient("L").convert("RGB"), "strength": 0.7, "num_inference_steps": 4}
    return call


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def from_threads(draw: Draw, threads: int, calls: int) -> tuple[int, int]:
    """(pictures other than the serial ones, calls that raised) of ``threads`` threads with ``calls`` calls each."""
    wanted = [digest(draw(i, **mixed(i))) for i in range(calls)]
    if len(set(wanted)) != calls:
        raise SystemExit("the calls do not all give different pictures, so mixed-up ones could not be told")
    other, raised, gate = [], [], threading.Barrier(threads)

    def work(k: int) -> None:
        order = np.random.default_rng(k).permutation(calls)
        gate.wait()
        for i in order.tolist():
            try:
                if digest(draw(i, **mixed(i))) != wanted[i]:
                    other.append(i)
            except Exception as error:  # whatever a race breaks
                raised.append(repr(error))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(other), len(raised)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts, while active, networks built, weights packed, and weights rearranged for another size of input."""
    counts: Counter[str] = Counter()
    places = [(Model, "__init__", "networks built"), (gemm.Linear, "pack", "weights packed"),
              (gemm.Conv2d, "pack", "weights packed"), (gemm.GatedLinear, "pack", "weights packed")]
    kept = [(cls, name, getattr(cls, name)) for cls, name, _ in places]
    at = onednn.Packed.at

    def counting(inner: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return inner(*args, **kwargs)
        return call

    def rearranging(self: onednn.Packed, x: torch.Tensor) -> torch.Tensor:
        before = self.held
        found = at(self, x)
        counts["weights rearranged"] += self.held is not before
        return found

    for cls, name, what in places:
        setattr(cls, name, counting(getattr(cls, name), what))
    onednn.Packed.at = rearranging  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        for cls, name, inner in kept:
            setattr(cls, name, inner)
        onednn.Packed.at = at  # type: ignore[method-assign]


def resident(trim: bool) -> int:
    """Resident bytes of this process; trim: after the allocator has given its freed pages back (glibc)."""
    gc.collect()
    if trim:
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


@dataclass(frozen=True)
class Shapes:
    """Of random calls after a warm-up: bytes that resident memory grew by, as it is and trimmed, and what was made."""

    grown: int
    grown_trimmed: int
    made: Counter[str]

    @property
    def holds(self) -> bool:
        return self.grown_trimmed <= MIB and not self.made["networks built"] and not self.made["weights packed"]


def random_shapes(draw: Draw, count: int, seed: int = 0) -> Shapes:
    rng = np.random.default_rng(seed)
    calls = [{"height": 8 * int(rng.integers(4, 17)), "width": 8 * int(rng.integers(4, 17)),
              "prompt": [PROMPTS[0]] * int(rng.integers(1, 5)), "num_inference_steps": int(rng.integers(1, 6)),
              "output_type": "np"} for _ in range(count)]
    largest = {**calls[0], "height": 128, "width": 128, "prompt": [PROMPTS[0]] * 4}
    for call in [largest, *calls[:count // 4]]:
        draw(0, **call)
    trimmed, before = resident(True), 0
    draw(0, **largest)  # what was trimmed is needed again
    before = resident(False)
    with counted() as made:
        for call in calls:
            draw(0, **call)
    after = resident(False)
    return Shapes(after - before, resident(True) - trimmed, made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("threads", "shapes"))
    parser.add_argument("--model", choices=("tiny", "accelerated", "diffusers"), default="tiny")
    parser.add_argument("--precision", default="exact", help="exact, bf16 or int8 (default %(default)s)")
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--calls", type=int, help="calls of each thread (default 20), or random shapes (default 200)")
    parser.add_argument("--torch-caches", action="store_true", help="of torch and oneDNN, of their usual size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = native(args.precision) if args.model == "tiny" else diffusers(args.precision, args.model == "accelerated")
    name = f"{args.model}, {args.precision}"
    if args.what == "threads":
        calls = args.calls or 20
        other, raised = from_threads(draw, args.threads, calls)
        print(f"{name}: {args.threads} threads x {calls} mixed calls: {args.threads * calls - other - raised} equal to "
              f"serial bit for bit, {other} other, {raised} raised")
        return 1 if other or raised else 0
    found = random_shapes(draw, args.calls or 200)
    print(f"{name}: {args.calls or 200} calls of random height, width, batch and steps: "
          f"{found.made['networks built']} networks built, {found.made['weights packed']} weights packed, "
          f"{found.made['weights rearranged']} rearranged for another size; resident memory "
          f"{found.grown / MIB:+.2f} MiB, {found.grown_trimmed / MIB:+.2f} MiB after malloc_trim")
    return 0 if found.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())

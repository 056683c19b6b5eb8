"""philox_normal: the normal numbers that torch's CUDA generator draws, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import LdmfastError, ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, case, place, register, shape_of

BLOCK = 256  # threads of a block of torch's kernels that draw
MOST = 2**29  # beyond it torch cuts a tensor into several draws
_WORD = 2**32 - 1
_TURN = 6.2831854820251465 * 2.0**-32  # 2 pi of fp32: the angle of one unit of the second word


def drawing_threads(count: int, threads: int) -> int:
    """Threads that torch starts for so many numbers on a GPU that holds ``threads`` of them."""
    return min(threads, -(-count // BLOCK) * BLOCK)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): four 32-bit words, held in int64."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        one, two = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64
        a, b, c, d = (two >> 32 & _WORD) ^ b ^ k, two & _WORD, (one >> 32 & _WORD) ^ d ^ m, one & _WORD
        k, m = k + 0x9E3779B9 & _WORD, m + 0xBB67AE85 & _WORD
    return a, b, c, d


def _words(state: Tensor, count: int, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pair of words of every number, and whether it is the second number of its pair."""
    width = max(drawing_threads(count, threads), 1)
    i = torch.arange(count, device=state.device)
    thread, call, place_in_call = i % width, i // (4 * width), i // width % 4
    seed, step = state[:, :1], (state[:, 1:] >> 2 & 2**62 - 1) + call
    zero = torch.zeros_like(step)
    words = torch.stack(philox((step & _WORD, step >> 32 & _WORD, zero + thread, zero),
                               (seed & _WORD, seed >> 32 & _WORD)), -1)
    second = place_in_call >= 2
    return (torch.where(second, words[..., 2], words[..., 0]), torch.where(second, words[..., 3], words[..., 1]),
            place_in_call % 2 == 1)


def _normal(state: Tensor, count: int, threads: int, dtype: torch.dtype) -> Tensor:
    first, second, odd = _words(state, count, threads)
    u = (first.float() * 2.0**-32 + 2.0**-33).to(dtype)  # Box-Muller with arguments rounded to fp32, as in cuRAND
    v = (second.float().double() * _TURN + _TURN / 2).float().to(dtype)
    return ((-2 * u.log()).sqrt() * torch.where(odd, v.cos(), v.sin())).float()


def reference(state: Tensor, count: int, threads: int) -> Tensor:
    return _normal(state, count, threads, torch.float64)


def peer(state: Tensor, count: int, threads: int) -> Tensor:
    return _normal(state, count, threads, torch.float32)


def fake(state: Tensor, count: int, threads: int) -> Tensor:
    return state.new_empty((state.shape[0], count), dtype=torch.float32)


def cost(state: Tensor, count: int, threads: int) -> Cost:
    numbers = state.shape[0] * count
    return Cost(flops=60.0 * numbers, bytes=4.0 * numbers)


def cases() -> Iterator[Case]:
    def make(*states: tuple[int, int], count: int, threads: int = 132 * 2048, layout: str = "contiguous"):
        def draw(d: Draw) -> tuple:
            return place(torch.tensor(states, dtype=torch.int64).reshape(-1, 2), layout), count, threads
        return draw

    yield case("sd15_512", "network", make((0, 0), (1, 0), count=4 * 64 * 64))
    yield case("sdxl_1024_batch", "network", make((7, 0), (8, 0), (9, 4), (2**40, 8), count=4 * 128 * 128))
    yield case("video", "network big", make((3, 0), count=16 * 21 * 60 * 104))
    yield case("more_than_threads", "", make((5, 12), count=1100, threads=512))
    yield case("several_calls", "", make((5, 12), (6, 0), count=2500, threads=256))
    yield case("high_words", "", make((-1, 2**62), (2**63 - 1, 2**34 - 4), count=300, threads=256))
    yield case("ragged", "ragged", make((11, 4), (12, 0), count=1031, threads=256))
    yield case("one_number", "ragged", make((11, 4), count=1))
    yield case("sliced", "view", make((11, 4), (12, 0), count=77, layout="slice"))
    yield case("misaligned", "view", make((11, 4), (12, 0), count=77, layout="view"))
    yield case("no_numbers", "empty", make((11, 4), count=0))
    yield case("no_states", "empty", make(count=9))


_call = register(Op("philox_normal", "(Tensor state, int count, int threads) -> Tensor", reference, fake, cases, cost,
                    peer))


@public
def philox_normal(state: Tensor, count: int, *, threads: int = 132 * 2048) -> Tensor:
    """What ``torch.randn(count, device="cuda", generator=g)`` draws for each (seed, offset) of g: Philox4x32-10 (Salmon
    et al. 2011) and Box-Muller as cuRAND has them, thread i of torch's kernel drawing numbers i, i + S, ... of its own
    subsequence, S the number of threads. Equal to CUDA's numbers but for rounding.

    state: (N, 2) int64, [seed, offset] of N generators, on the device that draws and read there, so that a CUDA graph
    can advance it. offset: a multiple of 4, as torch keeps it; after the call g's has grown by 4 ceil(count / (4 S)),
    S = min(threads, count rounded up to a multiple of 256).
    threads: what the GPU to be imitated holds at once, in blocks of 256 (default: the 132 x 2048 of an H100 and H200);
    it matters for larger counts only. Half-precision draws of torch are these numbers rounded; fp64 ones are others.
    Output: (N, count) float32. Every device gives the same bits.
    Raises ShapeError for another state, LdmfastError for a count or a number of threads out of range.
    """
    if state.ndim != 2 or state.shape[1] != 2 or state.dtype != torch.int64:
        raise ShapeError(f"philox_normal: state is {state.dtype} of shape {shape_of(state)}, needs int64 of (N, 2): "
                         "seed and offset of each generator")
    if not 0 <= count <= MOST:
        raise LdmfastError(f"philox_normal: count is {count}, needs 0 to 2^29; draw more in several calls")
    if threads < BLOCK or threads % BLOCK or threads > 2**30:
        raise LdmfastError(f"philox_normal: threads is {threads}, needs a multiple of {BLOCK} up to 2^30: "
                           "multiprocessors times threads of each")
    return _call(state, count, threads)

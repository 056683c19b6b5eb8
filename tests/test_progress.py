"""Progress bars where what they are written to fails: the work ends all the same, in every thread."""

from __future__ import annotations

import errno
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import ldmfast
from ldmfast.progress import Bar


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def closed() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("file", [FullDisk, closed, lambda: None])
def test_pictures_are_drawn_where_the_bar_cannot_be(file, monkeypatch):
    pipe = ldmfast.Pipeline.tiny()

    def draw(seed: int) -> np.ndarray:
        return pipe("a red circle", generator=seed, num_inference_steps=2, output_type="np").images

    expected = [draw(seed) for seed in range(4)]
    monkeypatch.setattr(sys, "stderr", file())
    pool = ThreadPoolExecutor(2)
    found = [f.result(timeout=300) for f in [pool.submit(draw, seed) for seed in range(4)]]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found))


def test_the_lock_is_free_after_a_failed_write():
    for bar in (Bar(total=3, file=FullDisk()), Bar(range(3), file=FullDisk())):
        bar.update()
        bar.set_postfix_str("halfway")
        bar.close()

    def free() -> bool:
        got = Bar._lock.acquire(timeout=5)
        if got:
            Bar._lock.release()
        return got

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(free).result()


def test_a_bar_is_drawn_where_it_can_be():
    file = io.StringIO()
    with Bar(total=2, file=file, unit="step") as bar:
        bar.update(2)
    assert "2/2" in file.getvalue()

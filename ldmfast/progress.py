"""Progress bars that never stop a call: where a terminal or a log cannot be written to, the work goes on without."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """tqdm, which for a full disk would raise and keep its lock: the next bar of any other thread would wait forever.

    Its lock is this process's alone: tqdm's is shared with forked ones, one of which may be killed while it holds it.
    """

    _lock = threading.RLock()

    def __init__(self, *args: Any, **options: Any) -> None:
        if options.get("file") is None and sys.stderr is None:  # a program without a console, or closed by the shell
            options["disable"] = True
        super().__init__(*args, **options)

    def display(self, *args: Any, **options: Any) -> Any:
        with suppress(OSError, ValueError):  # ValueError: a closed file
            return super().display(*args, **options)

    def close(self) -> None:
        with suppress(OSError, ValueError):
            super().close()

"""diffusers' own scheduler tests with ldmfast's classes in place of its own.

    python tools/diffusers_scheduler_suite.py PATH_TO_A_DIFFUSERS_CHECKOUT [--own] [-k ...any pytest option]

The checkout gives tests/, the installed diffusers everything else. ``--own`` runs diffusers' classes for comparison.
Prints passed, failed and skipped for each file; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import collections
import os
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest

FILES = ("ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "heun",
         "kdpm2_discrete", "kdpm2_ancestral", "dpm_multi", "deis", "unipc", "lcm", "flow_match_euler",
         "flow_match_heun")


class Counts:
    """pytest plugin: outcomes of each file."""

    def __init__(self) -> None:
        self.files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.files[report.nodeid.split("::")[0]][report.outcome] += 1


def main() -> int:
    checkout, options = Path(sys.argv[1]).resolve(), sys.argv[2:]
    if "--own" in options:
        options.remove("--own")
    else:
        from ldmfast.samplers import diffusers_shell
        for name in diffusers_shell.__all__:
            if name != "SchedulerError":
                setattr(diffusers, name, getattr(diffusers_shell, name))
                setattr(diffusers.schedulers, name, getattr(diffusers_shell, name))
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    files = [f"tests/schedulers/test_scheduler_{name}.py" for name in FILES]
    files = [file for file in files if Path(file).exists()] + ["tests/schedulers/test_schedulers.py"]
    counts = Counts()
    pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", *options, *files], plugins=[counts])
    for file, c in counts.files.items():
        print(f"{Path(file).name:45} {c['passed']:4} passed {c['failed']:4} failed {c['skipped']:4} skipped")
    return int(any(c["failed"] for c in counts.files.values()) or not counts.files)


if __name__ == "__main__":
    sys.exit(main())

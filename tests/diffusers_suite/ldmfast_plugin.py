"""pytest plugin under which diffusers' own tests test accelerated models.

    cd <a checkout of diffusers>
    PYTHONPATH=<ldmfast>/tests/diffusers_suite:<ldmfast> python -m pytest -p ldmfast_plugin tests/models/unets

Every model of a class that ldmfast knows gets the accelerated forward when it is built, and every pipeline is shared by
threads when it has its components, as ``accelerate`` does both. At the end a table says how many calls the native
networks served, and how many diffusers served, for which reasons. ``--ldmfast-precision bf16``
(or int8): then tests that compare with numbers of diffusers' fail by design, and none may crash.
"""

from __future__ import annotations

import collections
import functools

import diffusers
import pytest

from ldmfast import accelerated
from ldmfast.accelerated import calls, state, threads

served: collections.Counter[str] = collections.Counter()
refused: collections.Counter[str] = collections.Counter()


def _accelerate_when_built(kind: type, precision: str) -> None:
    build = kind.__init__

    @functools.wraps(build)
    def init(self, *args, **kwargs):
        build(self, *args, **kwargs)
        if type(self) is kind:
            shared = vars(self)[accelerated._STATE] = state.State(self, precision)
            for part in calls.CALLS[kind.__name__]:
                module = self.get_submodule(part)
                vars(module)["forward"] = state.Forward(shared, module, part)

    kind.__init__ = init


def _sharing(register):
    @functools.wraps(register)
    def registered(pipe, **components):
        register(pipe, **components)
        threads.share(pipe)

    return registered


def _counting(name: str, call):
    @functools.wraps(call)
    def counted(native, given):
        out = call(native, given)
        served[name] += 1
        return out

    return counted


def _count_refusals(warn):
    @functools.wraps(warn)
    def counted(self, model, reason):
        refused[f"{type(model).__name__}: {reason}"] += 1
        warn(self, model, reason)

    return counted


def pytest_addoption(parser) -> None:
    parser.addoption("--ldmfast-precision", default="exact", choices=("exact", "bf16", "int8", "fp8"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config) -> None:
    for name, parts in calls.CALLS.items():
        _accelerate_when_built(getattr(diffusers, name), config.getoption("--ldmfast-precision"))
        for part, call in parts.items():
            parts[part] = _counting(f"{name} {part}".strip(), call)
    diffusers.DiffusionPipeline.register_modules = _sharing(diffusers.DiffusionPipeline.register_modules)
    state.State.warn = _count_refusals(state.State.warn)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.section("calls of accelerated models")
    for name, count in sorted(served.items()):
        terminalreporter.write_line(f"{count:6d} native    {name}")
    for reason, count in refused.most_common():
        terminalreporter.write_line(f"{count:6d} diffusers {reason}")

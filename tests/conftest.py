"""Fixtures of the tests of accelerate()."""

from __future__ import annotations

import pytest


@pytest.fixture
def native_calls(monkeypatch):
    """Names of the calls that ldmfast's networks served in place of diffusers' forward, in order."""
    from ldmfast.accelerated import calls

    names: list[str] = []

    def note(name, call):
        return lambda native, given: (call(native, given), names.append(name))[0]

    for kind, parts in calls.CALLS.items():
        for part, call in parts.items():
            monkeypatch.setitem(parts, part, note(part or kind, call))
    return names

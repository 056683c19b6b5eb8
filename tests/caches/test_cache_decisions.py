"""Decisions and forecasts on features that are known functions of the evaluation's number, and what is held of them."""

from __future__ import annotations

import math

import pytest
import torch
from cache_cases import CASES, TIMES
from torch import Tensor

import ldmfast
from ldmfast.caches import (
    DeepCache,
    EasyCache,
    FirstBlock,
    Judge,
    MagCache,
    ParaStep,
    Policy,
    PromptKV,
    Session,
    TaylorSeer,
    TeaCache,
)
from ldmfast.caches.policy import Call
from ldmfast.samplers import make_table, sample
from ldmfast.samplers.schedules import Schedule

STEPS = 12


class Known:
    """A network of one segment of each kind whose values are a given function of the step."""

    segments = ("self", "tail", "stack", "output")

    def __init__(self, kind: str, value, indicator=lambda step: 1.0) -> None:
        self.kind, self.value, self.indicator = kind, value, indicator

    def __call__(self, x: Tensor, session: Session, step: int) -> Tensor:
        def full(number: float) -> Tensor:
            return torch.full((1, 2, 3), number, dtype=torch.float64)

        x = full(0.0)
        if self.kind == "self":
            return session.value("self", 0, lambda: full(self.value(step)))
        if self.kind == "output":
            return full(self.value(step))
        first = full(self.indicator(step))
        return session.stack(x, lambda: full(self.value(step)), lambda: first,
                             lambda h: h + self.value(step), lambda: first)


def run(policy: Policy, net: Known, inputs=lambda step: 0.0, steps: int = STEPS) -> tuple[list[float], Session]:
    session = Session((policy,), Call(tuple(float(steps - i) for i in range(steps)), net.segments, "Known"))
    found = []
    for step in range(steps):
        x = torch.full((1, 2, 3), inputs(step), dtype=torch.float64)
        found.append(float(session.evaluate(lambda rows, s=step: net(rows, session, s), x, step)[0, 0, 0]))
    return found, session


def polynomial(degree: int):
    return lambda s: 3.0 + sum((k + 1) * (0.1 * s) ** (k + 1) for k in range(degree))


@pytest.mark.parametrize("on", ["layers", "output", "stack"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_error_of_a_forecast_is_the_series_remainder(on: str, order: int) -> None:
    """Computed at 0, 1, 2, 5, 8, 11. A constant (order 0) or affine (order 1 and above) feature is forecast exactly; of
    s^2 order 1 misses k (k + gap), k evaluations after the newest value: the second divided difference, 1, times both
    distances; order 2 adds k^2 / 2 times the change of slope over the last gap, (gap + before) / gap."""
    policy = TaylorSeer(interval=3, first=3, order=order, on=on)
    kind = "self" if on == "layers" else on
    exact = polynomial(min(order, 1))
    found, session = run(policy, Known(kind, exact))
    assert session.forecast.total() + session.reused.total() == 6 and session.computed[kind] == 6
    assert found == pytest.approx([exact(s) for s in range(STEPS)], rel=1e-12)
    found, _ = run(policy, Known(kind, lambda s: float(s * s)))
    computed = [0, 1, 2, 5, 8, 11]
    for s in range(STEPS):
        newest = max(c for c in computed if c <= s)
        k, i = s - newest, computed.index(newest)
        gap = newest - computed[i - 1] if i else 0
        before = computed[i - 1] - computed[i - 2] if i > 1 else 0
        expected = [s * s - newest * newest, k * (k + gap), k * (k + gap) - k * k / 2 * (gap + before) / max(gap, 1)]
        if k and order < 3:
            assert s * s - found[s] == pytest.approx(expected[order], abs=1e-9), s
        elif k == 0:
            assert found[s] == s * s


def test_teacache_sums_changes_until_the_threshold() -> None:
    """The indicator grows by a tenth an evaluation: the sum reaches 0.25 at every third after a full one."""
    found, _ = run(TeaCache(threshold=0.25), Known("stack", float, lambda s: 1.1**s))
    assert found == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 11]
    found, _ = run(TeaCache(threshold=0.25, coefficients=(2.0, 0.0)), Known("stack", float, lambda s: 1.1**s))
    assert found == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 11]


def test_first_block_compares_with_the_last_full_evaluation() -> None:
    """The first block's residual grows by a tenth an evaluation: 1.1^3 - 1 is the first change above 0.3."""
    found, _ = run(FirstBlock(threshold=0.3), Known("tail", float, lambda s: 1.1**s))
    rest = [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
    assert found == pytest.approx([r + 1.1**s for s, r in enumerate(rest)])


def test_easycache_foretells_the_change_from_the_last_rate() -> None:
    """Input s, output 100 + 5 s: the rate is 5, and an evaluation's foretold change 5 / (output of the last full one),
    which falls from 0.048 to 0.02: with 0.11 as the bound two are left out, then three, then four."""
    found, session = run(EasyCache(threshold=0.11, warmup=2), Known("output", lambda s: 100.0 + 5 * s), float, 30)
    expected, total, full = [], 0.0, 1
    for s in range(30):
        total += 5 / (100.0 + 5 * full)
        if s < 2 or s == 29 or total >= 0.11:
            full, total = s, 0.0
        expected.append(100.0 + 5 * full)
    assert found == pytest.approx(expected) and session.evaluations == len(set(expected)) < 15
    found, _ = run(EasyCache(threshold=0.1, warmup=2, vector=True), Known("output", lambda s: 100.0 + s), float, 30)
    assert found == pytest.approx([100.0 + s for s in range(30)])  # output minus input does not change at all


def test_magcache_sums_what_the_ratios_foretell() -> None:
    """Ratios of 0.95: one evaluation left out misses 0.05, two 0.05 + 0.0975, above 0.1."""
    found, _ = run(MagCache(ratios=[0.95], threshold=0.1, retention=0), Known("stack", float))
    assert found == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
    found, _ = run(MagCache(ratios=[0.95], threshold=9, most=2, retention=0.25), Known("stack", float))
    assert found == [0, 1, 2, 2, 2, 5, 5, 5, 8, 8, 8, 11]


@pytest.mark.parametrize("int8", [False, True])
def test_what_is_held_is_bounded_counted_and_its_own(int8: bool) -> None:
    """A value that shows a part of a larger memory must not keep all of it; the bytes are those of ``order + 1`` values
    (in 8 bits a byte a number and four a row), and nothing is held after the last use."""
    wide = torch.randn(2, 64, 48)
    policy = TaylorSeer(interval=3, order=2, first=3, int8=int8)
    session = Session((policy,), Call(tuple(range(STEPS)), ("self",), "Known"))
    values, rows = 2 * 8 * 16, 2 * 8

    def network(_: Tensor) -> Tensor:
        return session.value("self", 0, lambda: wide[:, :8, :16])

    for step in range(STEPS):
        y = session.evaluate(network, torch.zeros(1), step)
        if step == 3:  # a forecast from equal values
            error = (y - wide[:, :8, :16]).abs().amax(-1) / wide[:, :8, :16].abs().amax(-1)
            assert float(error.max()) <= (0.51 / 127 if int8 else 1e-6)
            assert not int8 or float(error.max()) > 1e-4
            held = session.store.get("self", 0, 2)[0]
            assert int8 or held.untyped_storage().nbytes() == 4 * values
    assert session.store.peak == 3 * (values + 4 * rows if int8 else 4 * values)
    assert session.store.bytes == 0 and session.store.steps("self", 0) == ()


@pytest.mark.parametrize("policy", [TaylorSeer(interval=2, on="output"), DeepCache()], ids=repr)
def test_two_policies_for_one_kind_are_refused(policy: Policy) -> None:
    call = Call((1.0,), ("deep", "output"), "Known", 4)
    with pytest.raises(ldmfast.LdmfastError, match="both decide"):
        Session((policy, policy), call)


def test_blocks_that_a_judge_leaves_out_freeze_their_text_with_the_first() -> None:
    """The tail is left out at evaluation 1, where the plan computes text last before it is reused: at 2 the first block
    must not hold newer text than the others, which would take its untouched prompt for its text."""
    class Skips(FirstBlock):
        def judge(self, call: Call) -> Judge:
            judge = super().judge(call)
            judge.needed = lambda step, indicator: step != 1
            return judge

    _, net = CASES["sd3"].both()
    state = net.prepare(CASES["sd3"].times, **CASES["sd3"].conditions())
    session = Session.of([Skips(), PromptKV(interval=(0, 1, 4))], net, TIMES)
    x = torch.randn(CASES["sd3"].shape, generator=torch.Generator().manual_seed(0))
    held = []
    for step, t in enumerate(TIMES[:3]):
        session.evaluate(lambda rows, t=t: net(rows, t, state=state, cache=session), x, step)
        held.append([session.store.steps("text", i) for i in range(3)])
    assert all(held[0]) and all(held[2])


# ---- ParaStep: a Gaussian mixture's exact score, and the method written out with DDIM

MEANS, SPREAD = torch.tensor([-1.5, 0.4, 2.0], dtype=torch.float64), 0.3


def epsilon(x: Tensor, alpha: float) -> Tensor:
    """Noise prediction of the mixture at a signal level alpha (x = alpha x0 + sqrt(1 - alpha^2) noise)."""
    variance = (alpha * SPREAD) ** 2 + 1 - alpha**2
    distance = x[..., None] - alpha * MEANS
    weights = torch.softmax(-distance**2 / (2 * variance), dim=-1)
    return math.sqrt(1 - alpha**2) * (weights * distance).sum(-1) / variance


def test_parastep() -> None:
    steps = 50
    table = make_table(Schedule(), "ddim", steps)
    times, levels = table.network_times, table.noise_levels[:, 0]
    x = torch.randn(400, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = dict(zip(times.tolist(), levels.tolist()))

    def denoise(y: Tensor, t: float, stage: int) -> Tensor:
        return epsilon(y, level[t])

    def ddim(y: Tensor, e: Tensor, i: int) -> Tensor:
        a, b = float(levels[i]), float(levels[i + 1])
        x0 = (y - math.sqrt(1 - a * a) * e) / a
        return b * x0 + math.sqrt(max(0.0, 1 - b * b)) * e

    serial = sample(denoise, x, table=table)
    assert torch.equal(ParaStep(ranks=1).sample(denoise, x, table=table), serial)
    drifts = []
    for ranks in (2, 4):
        policy = ParaStep(ranks=ranks, warmup=10)
        y, stale, i = x, x, 0
        while i < steps:
            count = 1 if i < 10 else min(ranks, steps - i)
            fresh, ahead = [], y
            for j in range(count):
                fresh.append(epsilon(ahead, float(levels[i + j])))
                ahead = ddim(ahead, stale, i + j)
            for j in range(count):
                y = ddim(y, fresh[j], i + j)
            stale, i = fresh[-1], i + count
        found = policy.sample(denoise, x, table=table)
        torch.testing.assert_close(found, y, rtol=1e-6, atol=1e-6)
        drifts.append(float((found - serial).abs().mean()))
        assert policy.critical_path(steps) == 10 + 40 // ranks
    assert 0 < drifts[0] < drifts[1] < 0.05, drifts

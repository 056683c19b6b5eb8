"""The tuner: on tables of settings whose optimum is known, and on the shipped model."""

from __future__ import annotations

import math
import random
import statistics
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ldmfast
from ldmfast.caches import DeepCache, EasyCache, Guard, TaylorSeer
from ldmfast.guidance import CFG
from ldmfast.samplers import Schedule, make_table, sample
from ldmfast.tuning import Settings, plans, search, space
from ldmfast.tuning.search import Candidate, Measure
from ldmfast.tuning.tune import split

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "yellow", "cyan", "black")
           for shape in ("circle", "square", "ring", "cross")]


class Mine(CFG):
    """A guidance that settings cannot keep."""


class Table:
    """Settings with n steps take n / 20 of the time; what they cost is planted: mean PSNR and its spread."""

    def __init__(self, seed: int, means: dict[int, float], spread: float = 3.0) -> None:
        self.random, self.means, self.spread = random.Random(seed), means, spread
        self.drawn: set[int] = set()

    def turn(self, candidates, part) -> bool:
        self.drawn |= set(part)
        busy = self.random.uniform(1, 3)  # the machine is slow for a while, for all of a turn
        for c in candidates:
            c.values += [self.random.gauss(self.means[c.settings.steps], self.spread) for _ in part]
            c.ratios.append(busy * 20 / (busy * c.settings.steps) * self.random.uniform(0.99, 1.01))
        return True

    def run(self, prompts: int = 60):
        calibration, held_out = split(prompts, 0)
        first = [Candidate(Settings(steps=n)) for n in self.means]
        draws = search.Draws(self.turn, self.turn, lambda c: self.turn([c], calibration), self.turn)
        return search.run(Measure("psnr", 30.0), draws, search.Tries(first),
                          [calibration[i:i + 4] for i in range(0, len(calibration), 4)],
                          [held_out[i:i + 4] for i in range(0, len(held_out), 4)])


def test_single_changes_leave_time_for_combinations():
    """Their first turn is drawn with the search's own time, further ones with a part of it, which may be over."""
    asked = []

    def turn(name, more):
        def draw(candidates, part):
            asked.append((name, tuple(part)))
            for c in candidates if more else ():
                c.values += [40.0 for _ in part]
                c.ratios.append(20 / c.settings.steps)
            return more
        return draw

    pair = [Candidate(Settings(steps=5))]
    draws = search.Draws(turn("brief", False), turn("search", True), lambda c: False, turn("test", True))
    tries = search.Tries([Candidate(Settings(steps=10))], combinations=lambda measured: pair)
    chosen, measured = search.run(Measure("psnr", 30.0), draws, tries,
                                  [range(i, i + 4) for i in range(0, 24, 4)], [range(24, 64)])
    assert [name for name, _ in asked] == ["search", "brief", "search", "search", "search", "test"]
    assert chosen is not None and chosen.settings.steps == 5 and len(measured) == 2


def test_the_known_optimum_is_found():
    table = Table(0, {18: 45.0, 15: 41.0, 12: 38.0, 10: 36.0, 8: 33.0, 6: 27.0, 4: 20.0})
    chosen, measured = table.run()
    assert chosen is not None and chosen.settings.steps == 8 and chosen.speed == pytest.approx(2.5, rel=0.02)
    assert len(chosen.values) == 40 and len(measured) == 7 and table.drawn == set(range(60))
    assert [c.settings.steps for c in search.front(measured)][-1] == 18
    assert Table(1, {10: 27.0, 6: 20.0}).run()[0] is None


def test_the_promise_holds_as_often_as_it_says():
    """1000 tuned tables whose settings lie around the limit: the mean of 100 unseen pictures of what was chosen is
    below the promise in at most 5% of them (and chance: three standard deviations)."""
    broken = found = 0
    for seed in range(1000):
        draw = random.Random(seed)
        means = {n: draw.gauss(30, 1.0) + n / 8 for n in (4, 6, 8, 10, 12)}
        table = Table(seed, means, spread=draw.uniform(1, 5))
        chosen, _ = table.run(36)
        if chosen is not None:
            unseen = statistics.fmean(draw.gauss(means[chosen.settings.steps], table.spread) for _ in range(100))
            found, broken = found + 1, broken + (unseen < 30)
    assert found > 300
    assert broken <= 1000 * (0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000))


def test_testing_ends_at_the_first_failure():
    good, bad = [32.0 + 0.1 * i for i in range(20)], [25.0 + 0.5 * i for i in range(20)]
    row = [Candidate(Settings(steps=n), values=v, ratios=[20 / n]) for n, v in ((10, good), (8, bad), (6, good))]
    measure = Measure("psnr", 30.0)
    assert [c.settings.steps for c in search.passed(measure, row)] == [10]
    assert search.passed(measure, [Candidate(Settings(steps=6), values=good[:15], ratios=[3.0])]) == []  # too few
    alike = [Candidate(Settings(steps=n), values=[v] * 20, ratios=[r]) for n, v, r in ((8, 33.0, 2.5), (7, 31.0, 2.55))]
    assert search.best(measure, alike) is alike[0]
    assert search.best(measure, [Candidate(Settings(), values=good, ratios=[0.9])]) is None


def test_a_finalist_that_raises_ends_the_testing(tiny, monkeypatch):
    """As a failure does; on calibration prompts it is dropped alone."""
    from ldmfast.tuning import measure
    from ldmfast.tuning.tune import _Trials

    def draw(pipe, settings, *a):
        if settings.steps == 8:
            raise ldmfast.errors.PrecisionError("numbers became NaN")
        return SimpleNamespace(images=torch.rand(2, 3, 8, 8), seconds=1.0, report=None, made={"steps": settings.steps})

    monkeypatch.setattr(measure, "draw", draw)
    trials = _Trials(tiny, Measure("psnr", 5.0), Settings(), PROMPTS, list(range(24)), {}, 1e6, False)
    trials.warm.add("exact")
    row, searched = ([Candidate(Settings(steps=n)) for n in (10, 8, 6)] for _ in range(2))
    assert trials.test(row, [0, 1]) and [c.settings.steps for c in row] == [10] and row[0].made == {"steps": 10}
    assert trials.turn(1e6, searched, [0, 1]) and [c.settings.steps for c in searched] == [10, 6]
    assert [n.partition("8 steps ")[2] for n in trials.notes] == [
        "failed on held-out prompts, where testing ended: numbers became NaN", "was dropped: numbers became NaN"]


def test_bounds_of_the_chosen_hold_for_all_that_were_tested(tiny):
    """Chosen of five by the same pictures: the bounds for the share and for one more are those at 99%."""
    from scipy import stats

    from ldmfast.tuning.tune import _Trials

    values = [30.0 + 0.1 * i for i in range(120)]
    trials = _Trials(tiny, Measure("psnr", 30.5), Settings(), PROMPTS, list(range(24)), {}, 1e6, False)
    found = {n: trials.settings(Candidate(Settings(steps=6), values=values, ratios=[2.0], finalists=n)).promise
             for n in (1, 5)}
    for n, promise in found.items():
        assert promise.finalists == n and promise.share == 115 / 120
        assert promise.share_bound == pytest.approx(stats.beta.ppf(0.05 / n, 115, 6))
    assert found[1].one == pytest.approx(values[5]) and found[5].one == pytest.approx(values[0])  # of 121: 6th, 1st
    assert [c.finalists for c in search.finalists(Measure("psnr", 30.0), [
        Candidate(Settings(steps=n), values=[40.0 + n, 41.0 + n], ratios=[20 / n]) for n in (4, 6, 8)], 40)] == [3] * 3


def test_errors_of_a_pair_add_as_squares():
    psnr, latent = Measure("psnr", 30.0), Measure("latent_error", -0.1)
    a, b = Candidate(Settings(precision="int8"), [33.0103], [1.5]), Candidate(Settings(steps=9), [33.0103], [2.0])
    (both,) = search.combine(psnr, [a], [b], space._joined, 5)
    assert both.settings == Settings(precision="int8", steps=9) and not both.values
    assert psnr.value(2 * psnr.squared(33.0103)) == pytest.approx(30, abs=1e-4)
    assert latent.value(latent.squared(-0.06) + latent.squared(-0.08)) == pytest.approx(-0.1)
    assert search.combine(Measure("psnr", 32.0), [a], [b], space._joined, 5) == []


def test_everything_is_tried_in_the_fastest_precision_that_costs_little():
    """A quarter of the squared error of 30 dB is that of 36 dB."""
    row = [Candidate(Settings(precision=p), [v] * 4, [r]) for p, v, r in (
        ("bf16", 50.0, 1.8), ("int8", 36.1, 2.5), ("fp8", 35.9, 3.0))]
    assert space.fastest(Measure("psnr", 30.0), Settings(), row) == Settings(precision="int8")
    assert space.fastest(Measure("psnr", 45.0), Settings(), row) == Settings()
    assert space.fastest(Measure("latent_error", -0.1), Settings(), [Candidate(row[0].settings, [-0.049], [2.0]),
                                                                     Candidate(row[1].settings, [-0.051], [3.0])]
                         ) == Settings(precision="bf16")


def placed(plan, order=1, full=None) -> Settings:
    forecast = TaylorSeer(interval=plan, order=order, on="output")
    return Settings(precision="bf16", cache=forecast if full is None else (forecast, DeepCache(interval=full)))


def test_neighbours_take_as_long():
    """Every one has as many evaluations and as many of them shallow; all single moves are among them, and no other."""
    start, found = placed((0, 2, 3, 9), full=(0, 2, 9)), space.nearby(10, placed((0, 2, 3, 9), full=(0, 2, 9)))
    assert start not in found and len({repr(s) for s in found}) == len(found)
    assert {(s.cache[0].order, s.cache[0].interval, s.cache[1].interval) for s in found} == {
        (2, (0, 2, 3, 9), (0, 2, 9)), (1, (0, 1, 3, 9), (0, 1, 9)), (1, (0, 2, 4, 9), (0, 2, 9)),
        (1, (0, 2, 3, 8), (0, 2, 8)), (1, (0, 2, 3, 9), (0, 3, 9)), (1, (0, 2, 3, 9), (0, 2, 3))}
    assert {len(s.cache) for s in space.nearby(10, placed((0, 4)))} == {1}


def test_faster_plans_leave_out_one_more(tiny):
    """One evaluation fewer, or one of them shallow; the first is always computed in full. A transformer has no shallow
    part."""
    fewer, deeper = space.faster(tiny, placed((0, 2, 3, 9), full=(0, 2, 9)))
    assert [(s.cache[0].interval, s.cache[-1].interval) for s in fewer] == [
        ((0, 3, 9), (0, 9)), ((0, 2, 9), (0, 2, 9)), ((0, 2, 3), (0, 2))]
    assert [(s.cache[0].interval, s.cache[1].interval) for s in deeper] == [((0, 2, 3, 9), (0, 9)),
                                                                            ((0, 2, 3, 9), (0, 2))]
    no_deep = SimpleNamespace(unet=SimpleNamespace(segments=("self", "output")))
    assert [[s.cache[0].interval for s in way] for way in space.faster(no_deep, placed((0, 2, 9)))] == [
        [(0, 9), (0, 2)], []]
    assert space.faster(tiny, placed((0, 2))) == []
    rows = [Candidate(placed((0, k)), [v, v + 1] * 8, [r])
            for k, v, r in ((9, 36.0, 2.0), (5, 33.0, 3.0), (2, 31.0, 4.0))]
    rows += [Candidate(Settings(precision="bf16"), [50.0, 51.0] * 8, [9.0])]
    assert space.start(Measure("psnr", 31.0), Settings(precision="bf16"), rows, 40) is rows[1]
    assert space.start(Measure("psnr", 40.0), Settings(precision="bf16"), rows, 40) is None


def test_climbing_finds_the_placement_and_ends():
    """Quality falls with the distance from a planted plan of its size; plans of two evaluations cannot keep the
    promise, and end the climb."""
    best, drawn = {4: (0, 3, 6, 9), 3: (0, 5, 8)}, []

    def trial(c) -> bool:
        plan = c.settings.cache[0].interval
        drawn.append((plan, c.settings.cache[0].order))
        miss = sum(abs(a - b) for a, b in zip(plan, best[len(plan)])) if len(plan) in best else 10
        c.values += [33.0 - 0.3 * miss + 0.1 * (i % 3) for i in range(8)]
        c.ratios.append(20 / len(plan))
        return len(drawn) < 400

    def climb(begin, trial):
        return search.climb(Measure("psnr", 31.8), Candidate(placed(begin)), lambda s: space.faster(no_deep, s),
                            lambda s: space.nearby(10, s), trial, 40)

    no_deep = SimpleNamespace(unet=SimpleNamespace(segments=("output",)))
    found = climb((0, 1, 2, 4, 7), trial)
    tops = {n: max((c for c in found if len(c.settings.cache[0].interval) == n), key=lambda c: c.mean) for n in (4, 3)}
    assert {n: c.settings.cache[0].interval for n, c in tops.items()} == best
    assert {len(plan) for plan, _ in drawn} == {4, 3, 2}  # and no fewer
    assert len(set(drawn)) == len(drawn) < 150
    assert climb((0, 1, 2, 4, 7), lambda c: False) == []  # time is up


def test_a_guards_limit_is_learnt_from_the_worst_ratio():
    """Four pictures whose RMSE is 0.01 to 0.04 of their indicator; 30 dB is an RMSE of 10^-1.5."""
    used, ratio = [1.0, 2.0, 1.5, 0.5], [0.01, 0.04, 0.02, 0.03]
    values = [-20 * math.log10(u * r) for u, r in zip(used, ratio)]
    c = Candidate(Settings(cache=Guard(policy=EasyCache(threshold=1.0), limit=math.inf)), values, [2.0], used)
    assert search.guard_limit(Measure("psnr", 30.0), c) == pytest.approx(10**-1.5 / 0.04)
    (guarded,) = space.combinations(Measure("psnr", 30.0), Settings(), [c])
    assert guarded.settings.cache[0].limit == pytest.approx(10**-1.5 / 0.04)
    assert search.guard_limit(Measure("psnr", 30.0), replace(c, used=[0.0] * 4)) is None


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
def test_the_influence_of_a_prediction_is_its_derivative(solver: str):
    """A prediction is moved; the finished latents move by the coefficient."""
    schedule = Schedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    table = make_table(schedule, solver, 5).with_guidance(3.0)
    found = plans.influence(table)

    def last(moved: tuple[int, int] | None) -> float:
        def denoise(x, t, stage):
            return tuple(torch.full((1, 1), float((stage, b) == moved), dtype=torch.float64) for b in range(2))

        return float(sample(denoise, torch.zeros(1, 1, dtype=torch.float64), table=table))

    expected = [[last((i, b)) - last(None) for b in range(2)] for i in range(table.num_stages)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_plans_are_foreseen_and_placed():
    """Predictions that bend at one evaluation: a forecast of order 1 along a straight part errs nothing, so few
    evaluations suffice where the bend is among those computed; found by leaving out one after another."""
    n, bend = 10, 6
    curve = np.array([[min(i, bend) + 3.0 * max(0, i - bend)] for i in range(n)])
    products, weights = (curve @ curve.T)[None], np.ones(n)
    assert plans.foreseen((0, 1, bend, bend + 1), 1, products, weights) < math.log(1e-20)
    left = (3.0 - 1) * sum(range(1, n - bend))  # what the old slope misses after the bend
    assert plans.foreseen((0, 1, bend), 1, products, weights) == pytest.approx(math.log(left**2))
    best = plans.placements(products, weights, 1, 3)
    assert set(best) == set(range(3, n)) and plans.foreseen(best[4], 1, products, weights) < math.log(1e-20)


def test_what_a_plan_is_foreseen_to_err_is_what_it_errs(tiny):
    """Against a run of the plan with the recorded predictions played back, on the shipped model."""
    from ldmfast.tuning.measure import draw

    recorder = plans.Recorder()
    drawn = draw(tiny, Settings(steps=8, cache=(recorder,)), PROMPTS[:2], [0, 1], {})
    finished = drawn.trajectory.latents[-1]
    products, weights = plans.grams(recorder, drawn.table, finished)
    plain = draw(tiny, Settings(steps=8), PROMPTS[:2], [0, 1], {})
    assert torch.equal(plain.images, drawn.images)
    plan, errors = (0, 2, 4, 7), []
    for i, rows in enumerate(recorder.groups):
        def played(x, t, stage, rows=rows):
            held = [j for j in plan if j <= stage][::-1][:2]
            values = [rows[j].double() for j in held]
            y = rows[stage].double() if stage in plan else sum(w * v for w, v in zip(plans._weights(tuple(held), stage),
                                                                                     values))
            return y.chunk(2)

        off, on = (sample(f, torch.zeros(1, *finished.shape[1:], dtype=torch.float64), table=drawn.table)
                   for f in (played, lambda x, t, stage, rows=rows: rows[stage].double().chunk(2)))
        errors.append(float((off - on).norm() / finished[i].norm()))
    assert plans.foreseen(plan, 1, products, weights) == pytest.approx(np.log(np.square(errors)).mean(), abs=1e-4)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(space, "SHARES", (0.5,))
    monkeypatch.setattr(space, "precisions", lambda pipe, reference: ([], []))
    monkeypatch.setattr(space, "caches", lambda *a: [(TaylorSeer(interval=2, on="output"),), (DeepCache(interval=2),)])


def test_tune_on_the_shipped_model(tiny, small, tmp_path):
    found = tiny.tune(PROMPTS, min_psnr=25, budget_s=1e6, path=tmp_path / "own.json", reference=Settings(steps=8),
                      batch=8, progress=False)
    promise = found.promise
    assert promise is not None and promise.bound >= 25 and promise.held_out == 16 and promise.speedup > 1
    assert found.notes == () and Settings.load(tmp_path / "own.json") == found
    assert (tmp_path / "own.png").is_file() and sorted(f.name for f in tmp_path.iterdir()) == ["own.json", "own.png"]
    assert "over 100 unseen pictures" in str(found) and tiny.tuned["settings"] is found
    front = tiny.tuned["front"]
    assert any(p.settings.cache for p in front.points) and any(p.on_front for p in front.points)
    _, held_out = split(24, 0)
    report = tiny.certify([PROMPTS[i] for i in held_out], "auto", seeds=held_out, reference=Settings(steps=8), batch=8,
                          progress=False)
    assert statistics.fmean(report.psnr) == pytest.approx(promise.mean, abs=1e-3)  # the same pictures again
    out = tiny(PROMPTS[0], settings="auto", generator=0, progress=False, output_type="latent")
    assert out.report.promise == str(promise)
    tiny.tuned.clear()


def test_nothing_that_keeps_the_promise_gives_the_reference(tiny, small):
    found = tiny.tune(PROMPTS, max_latent_error=1e-7, budget_s=1e6, reference=Settings(steps=2), batch=12,
                      progress=False)
    assert found.promise is None and found.call() == {"num_inference_steps": 2}
    assert "no faster setting kept the promise (latent_error 1e-07)" in found.notes[0]
    assert "not saved: the folder of tiny is not written to" in found.notes[-1]
    assert tiny("a ring", settings="auto", progress=False, output_type="latent").report.promise.startswith("nothing")
    tiny.tuned.clear()


def test_a_plot_that_cannot_be_written_loses_no_settings(tiny, small, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["ldmfast.tuning.tune"].Front, "plot", full)
    with pytest.raises(ldmfast.LdmfastError, match=r"own\.png: cannot be written \(No space.*are in .*own\.json"):
        tiny.tune(PROMPTS, max_latent_error=1e-7, budget_s=1e6, path=tmp_path / "own.json",
                  reference=Settings(steps=2), batch=12, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["own.json"]
    assert Settings.load(tmp_path / "own.json") == tiny.tuned["settings"]
    tiny.tuned.clear()


def test_the_budget_ends_the_search(tiny, small, monkeypatch):
    """No trial begins once it is over."""
    clock = [0.0]
    monkeypatch.setattr(sys.modules["ldmfast.tuning.tune"], "time", SimpleNamespace(monotonic=lambda: clock[0]))
    from ldmfast.tuning import measure

    begun, plain = [], measure.draw

    reference = Settings(steps=2)

    def draw(*a):  # every candidate is faster and keeps the promise: what is begun hangs on the budget alone
        begun.append(clock[0])
        clock[0] += 3.0
        return replace(plain(*a), seconds=2.0 if a[1] == reference else 1.0)

    monkeypatch.setattr(measure, "draw", draw)
    found = tiny.tune(PROMPTS, min_psnr=0.1, budget_s=30, reference=reference, batch=2, progress=False)
    assert found.promise is None and 27 <= max(begun) <= 30 + 3  # a precision is warmed up within its first trial
    tiny.tuned.clear()


@pytest.mark.parametrize("arguments, words", [
    ({}, "give min_psnr or"), ({"min_psnr": 30, "max_latent_error": 0.1}, "one of the two"),
    ({"min_psnr": -3}, "not a number between"), ({"min_psnr": 30, "budget_s": 0}, "budget_s=0"),
    ({"min_psnr": 30, "prompts": PROMPTS[:6]}, "at least 24 prompts, 8 to search with and 16 held out.*6 given"),
    ({"min_psnr": 30, "path": "no/such/folder/x.json"}, "folder does not exist"),
    ({"min_psnr": 30, "path": "x.png"}, "x.png: does not end in .json"),
    ({"min_psnr": 30, "path": "x.json", "reference": Settings(guidance=Mine())}, "of your own cannot be saved"),
    ({"min_psnr": 30, "path": "x.json", "reference": Settings(cache=plans.Recorder())}, "of your own cannot be saved"),
    ({"min_psnr": 30, "sigma": 3}, "Pipeline takes no sigma")])
def test_what_tune_refuses(tiny, monkeypatch, arguments, words):
    """Before anything is drawn."""
    from ldmfast.tuning import measure

    monkeypatch.setattr(measure, "draw", lambda *a: pytest.fail("drawn"))
    with pytest.raises(ldmfast.LdmfastError, match=words):
        tiny.tune(**{"prompts": PROMPTS, **arguments})

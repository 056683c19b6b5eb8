"""Searches over noises on an exact mixture, where the law of the reward is known; and among pictures."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ldmfast
from ldmfast.errors import LdmfastError, ShapeError
from ldmfast.guidance import APG, CFG
from ldmfast.pipelines.open_call import open_call
from ldmfast.samplers import Schedule, make_table, sample
from ldmfast.search import BestOfN, Method, PathSearch, Problem, ZeroOrder, search
from ldmfast.testing.captions import parse_caption
from ldmfast.testing.judge import judge
from ldmfast.tuning import Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samplers"))
from mixture import DEVIATION, MEANS, WEIGHTS, epsilon

SCHEDULE = Schedule()


def probability(x: Tensor) -> Tensor:
    """The reward: the mixture's distribution function of the first coordinate, uniform on [0, 1] for true draws."""
    z = (x[:, :1] - torch.from_numpy(MEANS[:, 0])) / DEVIATION
    return (torch.from_numpy(WEIGHTS) * torch.erfc(-z / math.sqrt(2)) / 2).sum(1)


class Counted:
    def __init__(self, solver: str = "ddim", steps: int = 30) -> None:
        self.table, self.calls = make_table(SCHEDULE, solver, steps), 0

    def problem(self, seed: int = 0, batch: int = 8, verifier=probability) -> Problem:
        def denoiser(count: int):
            def predict(x: Tensor, t: float, stage: int) -> Tensor:
                self.calls += len(x)
                assert t == self.table.network_times[stage]  # of the whole run, where one is taken up inside, too
                return exact(x, t, stage)

            exact = epsilon(self.table)
            return predict

        def noise(generators: list[torch.Generator]) -> Tensor:
            return torch.cat([torch.randn(1, 2, generator=g, dtype=torch.float64) for g in generators])

        return Problem(self.table, denoiser, noise, verifier, seed=seed, batch=batch)


def away(values: list[float], power: int) -> float:
    """Kolmogorov's distance from the law F^power, times the root of the count: above 1.95 once in a thousand."""
    u = np.sort(values) ** power
    n = len(u)
    return float(max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())) * math.sqrt(n)


@pytest.mark.parametrize("method,power", [
    (BestOfN(1), 1), (BestOfN(8), 8), (ZeroOrder(3, 2, distance=1.0), 7), (PathSearch(3, 1, back=(0.0,)), 6),
], ids=["one", "best of 8", "neighbours that are far", "paths from the start"])
def test_the_best_obeys_the_law_of_the_largest(method: Method, power: int) -> None:
    """A search that only starts again is best of all its starts: its score has the reward's law to that power."""
    counted = Counted()
    found = [float(method.run(counted.problem(seed=100 * i, batch=32)).scores[0]) for i in range(250)]
    print(f"{method}: {away(found, power):.2f}, mean {np.mean(found):.3f} of {power / (power + 1):.3f}")
    assert away(found, power) < 1.95
    assert away(found, power + max(1, power // 2)) > 1.95  # the bound tells this law from its neighbours


@pytest.mark.parametrize("method", [ZeroOrder(4, 5, distance=0.3), PathSearch(4, 2)], ids=["zero-order", "paths"])
def test_the_score_never_falls_and_evaluations_are_counted(method: Method) -> None:
    gains = []
    for seed in range(10):
        counted = Counted("euler_a", 12)
        problem = counted.problem(seed=1000 * seed)
        best = method.run(problem)
        assert problem.history == sorted(problem.history) and problem.history[-1] == float(best.scores[0])
        assert float(probability(best.ends)[0]) == float(best.scores[0])
        assert counted.calls == problem.evaluations
        gains.append(problem.history[-1] - problem.history[0])
    assert np.mean(gains) > 0.02
    assert problem.verified == (21 if isinstance(method, ZeroOrder) else 16)


@pytest.mark.parametrize("method", [BestOfN(5), ZeroOrder(3, 2), PathSearch(4, 2)])
def test_batches_draw_what_single_runs_draw(method: Method) -> None:
    """With a solver that draws noise all along."""
    together, alone = (method.run(Counted("euler_a", 8).problem(batch=b)) for b in (8, 1))
    assert torch.equal(together.ends, alone.ends) and together.seeds == alone.seeds


def test_paths_taken_up_inside_keep_the_law() -> None:
    """Ends noised anew to the middle and run on are draws of the mixture again, without a verifier's choice."""
    counted = Counted(steps=60)
    problem = counted.problem(batch=4000)
    parents = problem.start(*problem.fresh(2000))
    for step in (15, 45):
        ends = problem.renoised(parents, step, 1).ends
        assert away(probability(ends).tolist(), 1) < 1.95
        assert float((ends - parents.ends).square().mean()) > (1.0 if step == 15 else 0.05)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(LdmfastError, match="carries predictions"):
        PathSearch(2, 1).run(Counted("dpmpp_2m", 8).problem())
    with pytest.raises(ShapeError, match="one number for each"):
        BestOfN(2).run(Counted().problem(verifier=lambda x: x))
    for make in (lambda: BestOfN(0), lambda: ZeroOrder(distance=0.0), lambda: PathSearch(3, 2),
                 lambda: PathSearch(2, 1, back=(1.0,))):
        with pytest.raises(LdmfastError):
            make()


@pytest.mark.parametrize("network,solver", [("unet", "ddim"), ("dit", "flow_euler")])
def test_the_judge_chooses_among_pictures_that_calls_draw(network: str, solver: str) -> None:
    """Best of N finds the picture of one of its seeds, as a call draws it; latents are scored without decoding."""
    pipe, caption = ldmfast.Pipeline.tiny(network), "a small red circle above a large blue square"
    call = {"num_inference_steps": 3, "solver": solver}

    def verifier(pictures: Tensor) -> list[float]:
        assert float(pictures.min()) >= 0 and float(pictures.max()) <= 1 and pictures.shape[1:] == (3, 64, 64)
        verdicts = judge(pictures * 2 - 1, [parse_caption(caption)] * len(pictures))
        return [sum(v.values()) + float(p.std()) for v, p in zip(verdicts, pictures)]

    found = search(pipe, caption, verifier, BestOfN(3), seed=5, batch=2, **call)
    drawn = [pipe(caption, generator=s, progress=False, output_type="pt", **call).images for s in (5, 6, 7)]
    scores = [verifier(p)[0] for p in drawn]
    assert found.seed == 5 + int(np.argmax(scores)) and found.score == pytest.approx(max(scores), abs=1e-4)
    assert found.evaluations == 9 and found.verified == 3
    again = pipe(caption, latents=found.noise, progress=False, output_type="latent", **call).images
    torch.testing.assert_close(again, found.latents, rtol=1e-4, atol=1e-4)
    seen: list[tuple[int, ...]] = []
    path = search(pipe, caption, lambda z: seen.append(tuple(z.shape)) or z.flatten(1).mean(1),
                  PathSearch(2, 1, (0.5,)), latent=True, **call)
    assert seen == [(2, *found.latents.shape[1:])] * 2 and path.noise is None
    assert path.history[1] >= path.history[0] and path.evaluations == 2 * 3 + 2 * 2
    assert path.score == pytest.approx(float(path.latents.mean()), abs=1e-5)


@pytest.fixture(scope="module")
def unet() -> ldmfast.Pipeline:
    return ldmfast.Pipeline.tiny()


CAPTION = "a red circle above a blue square"
CALL = {"num_inference_steps": 4, "solver": "ddim"}


def drawn_ends(pipe: ldmfast.Pipeline, method: Method, **call) -> list[Tensor]:
    """The latents that a verifier is shown; it likes the first of each batch best."""
    seen: list[Tensor] = []
    search(pipe, CAPTION, lambda z: seen.append(z.clone()) or -torch.arange(float(len(z))), method, latent=True, **CALL,
           **call)
    return seen


def test_a_guided_path_that_is_taken_up_inside_keeps_the_steps_weights(unet) -> None:
    """The scales of the third and fourth step are 1 and 5: the children are a run of two steps with these scales."""
    ends = drawn_ends(unet, PathSearch(2, 1, (0.5,)), guidance=CFG(schedule=[3, 3, 1, 5]))
    whole = open_call(unet, CAPTION, num_images_per_prompt=2, generator=[2, 3], **CALL)
    half = open_call(unet, CAPTION, num_images_per_prompt=2, generator=0, solver="ddim",
                     timesteps=whole.table.timesteps[2:].tolist(), guidance=CFG(schedule=[1, 5]))
    start = whole.table.add_noise(ends[0][[0, 0]], whole.x, 2)
    torch.testing.assert_close(ends[1], sample(half.denoise, start, table=half.table), rtol=1e-4, atol=1e-4)


def test_each_run_of_a_search_begins_without_momentum(unet) -> None:
    guidance = APG(scale=5.0, momentum=-0.5)
    ends = drawn_ends(unet, BestOfN(2), batch=1, guidance=guidance)
    for seed in (0, 1):
        alone = unet(CAPTION, generator=seed, guidance=guidance, output_type="latent", progress=False, **CALL).images
        torch.testing.assert_close(ends[seed], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name,value", [
    ("cache", ldmfast.caches.DeepCache(interval=2)), ("image", torch.zeros(1, 3, 64, 64)),
    ("mask_image", torch.zeros(1, 1, 64, 64)), ("strength", 0.5), ("callback_on_step_end", lambda *_: None),
    ("settings", Settings(steps=2)), ("settings", "auto"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_a_search_would_lose_is_refused(unet, name: str, value) -> None:
    with pytest.raises(LdmfastError, match=f"{name} has no place in a search"):
        search(unet, CAPTION, lambda z: z.flatten(1).mean(1), BestOfN(1), **{name: value})

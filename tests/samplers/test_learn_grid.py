"""Learned time grids on an exact score: how much nearer they end, and a known second list found."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from mixture import denoised, draw
from torch import Tensor

from ldmfast.errors import LdmfastError
from ldmfast.samplers import Schedule, TimeGrid, learn_grid, make_table, sample

VP, FLOW = Schedule(), Schedule(flow=True, prediction_type="flow_prediction", timestep_spacing="linspace")


class Network:
    """The mixture's exact prediction, told the noise level by the time alone, as a network is."""

    def __init__(self, schedule: Schedule, solver: str, late: float = 0.0) -> None:
        self.schedule, self.solver, self.late, self.calls = schedule, solver, late, 0

    def bind(self, grid: TimeGrid | int):
        if isinstance(grid, TimeGrid):
            table = grid.table(self.schedule)
        else:
            table = make_table(self.schedule, self.solver, grid)

        def predict(x: Tensor, t: float, stage: int) -> Tensor:
            self.calls += 1
            x0, alpha, sigma = self.picture(x.numpy(), t - self.late)
            noise = (x.numpy() - alpha * x0) / sigma
            return torch.from_numpy(noise - x0 if self.schedule.flow else noise)

        return table, predict

    def picture(self, x: np.ndarray, t: float) -> tuple[np.ndarray, float, float]:
        """(E[x0 | x], alpha, sigma) with x as the network is fed: variance preserving, or on the flow."""
        if self.schedule.flow:
            sigma = float(np.clip(t / 1000, 1e-4, 1 - 1e-4))
            alpha = 1 - sigma
        else:
            ratio = float(np.exp(np.interp(t, np.arange(1000), np.log(VP.train_sigmas))))
            alpha, sigma = 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)
        return denoised(x / alpha, sigma / alpha), alpha, sigma

    def end(self, grid: TimeGrid | int, noise: Tensor) -> Tensor:
        table, predict = self.bind(grid)
        return sample(predict, noise * table.init_noise_sigma, table=table)


def away(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean(1).sqrt().mean())


@pytest.mark.parametrize("solver,steps,schedule,gain", [
    ("dpmpp_2m", 6, VP, 10), ("ddim", 6, VP, 4), ("heun", 4, VP, 4),
    ("flow_euler", 6, FLOW, 5), ("dpmpp_2m", 6, FLOW, 4),
], ids=["dpmpp_2m", "ddim", "heun", "flow_euler", "flow-dpmpp_2m"])
def test_learned_steps_end_nearer_to_the_exact_solution(solver: str, steps: int, schedule: Schedule, gain: float
                                                        ) -> None:
    """On noises that were not learned from."""
    network = Network(schedule, solver)
    fine = Network(schedule, "flow_heun" if schedule.flow else "dpmpp_2m")
    noise, unseen = draw(200, 0), draw(500, 5)
    grid = learn_grid(network.bind, noise, fine.end(300, noise), schedule, solver, steps)
    exact = fine.end(300, unseen)
    usual, learned = away(network.end(steps, unseen), exact), away(network.end(grid, unseen), exact)
    print(f"{solver}: {usual:.4f} -> {learned:.4f}, {network.calls} evaluations")
    assert usual > gain * learned
    assert grid.error == pytest.approx(away(network.end(grid, noise), fine.end(300, noise)))
    assert grid.evaluations == make_table(schedule, solver, steps).num_stages


def test_the_second_list_undoes_a_network_that_runs_late() -> None:
    """A network trained with times that are off by 40 has an exact remedy, times that are off by 40 as well."""
    noise, unseen = draw(200, 0), draw(500, 5)
    true, late = Network(VP, "dpmpp_2m"), Network(VP, "dpmpp_2m", late=40.0)
    exact = true.end(300, unseen)
    right = learn_grid(true.bind, noise, true.end(300, noise), VP, "dpmpp_2m", 6, iterations=16)
    found = learn_grid(late.bind, noise, true.end(300, noise), VP, "dpmpp_2m", 6, iterations=16)
    moved = TimeGrid("dpmpp_2m", right.sigmas, tuple(t + 40 for t in right.network_times))
    torch.testing.assert_close(late.end(moved, unseen), true.end(right, unseen), rtol=0, atol=1e-12)
    assert away(late.end(found, unseen), exact) < away(late.end(6, unseen), exact) / 5


def test_evaluations_that_are_left_out_change_nothing() -> None:
    """Nudging a step leaves what was evaluated before it: the ends are bit-equal to whole runs, at half the cost."""
    network = Network(VP, "dpmpp_2m")
    noise = draw(8, 0)
    runs: list[tuple[TimeGrid, Tensor]] = []
    whole = Network(VP, "dpmpp_2m")

    def bind(grid: TimeGrid | int):
        table, predict = network.bind(grid)
        runs.append((grid, whole.end(grid, noise)))
        return table, predict

    learned = learn_grid(bind, noise, whole.end(300, noise), VP, "dpmpp_2m", 6, iterations=1)
    assert len(runs) >= 14 and torch.equal(whole.end(learned, noise), network.end(learned, noise))
    assert learned.error == float((whole.end(learned, noise) - whole.end(300, noise)).square().mean(1).sqrt().mean())
    nudged = len(runs) - 6  # whole: the usual run, the four that the search may start from, and what it tried
    assert network.calls - 6 * 6 < 0.75 * 6 * nudged


def test_levels_that_lie_close_stay_in_order() -> None:
    """Forty steps lie nearer to each other than the search would like to move one of them."""
    network, noise, asked = Network(VP, "dpmpp_2m"), draw(4, 0), []

    def bind(grid: TimeGrid | int):
        if isinstance(grid, TimeGrid):
            asked.append(grid)
        return network.bind(grid)

    with suppress(LdmfastError):  # one iteration need not find a better one
        learn_grid(bind, noise, network.end(100, noise), VP, "dpmpp_2m", 40, iterations=1)
    assert len(asked) > 80 and all((np.diff(grid.sigmas) < 0).all() for grid in asked)
    closest = min(np.diff(-np.log(grid.sigmas[:-1])).min() for grid in asked)
    assert 0.01 < closest < 0.1


def test_noise_and_shapes_are_refused() -> None:
    noise = draw(4, 0)
    with pytest.raises(LdmfastError, match="draws noise"):
        learn_grid(Network(VP, "euler_a").bind, noise, noise, VP, "euler_a", 4)
    with pytest.raises(LdmfastError, match="one shape"):
        learn_grid(Network(VP, "ddim").bind, noise, noise[:2], VP, "ddim", 4)


def test_a_grid_survives_its_file_and_starts_late(tmp_path: Path) -> None:
    grid = TimeGrid("dpmpp_2m", (20.0, 4.0, 1.0, 0.0), (999.0, 700.0, 300.5), error=0.1)
    grid.save(tmp_path / "grid.json")
    assert TimeGrid.of(tmp_path / "grid.json") == grid == TimeGrid.of(json.loads((tmp_path / "grid.json").read_text()))
    table, late = grid.table(VP), grid.table(VP, start=1)
    assert table.network_times.tolist() == [999, 700, 300.5] and late.network_times.tolist() == [700, 300.5]
    assert np.array_equal(table.matrices[:, :, :3], make_table(VP, "dpmpp_2m", sigmas=[20, 4, 1, 0]).matrices[:, :, :3])


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("solver,times", [("dpmpp_2m", 2), ("dpmpp_2m", 5), ("heun", 3), ("heun", 6)])
def test_there_is_one_time_for_each_evaluation(solver: str, times: int, start: int) -> None:
    grid = TimeGrid(solver, (20.0, 4.0, 1.0, 0.0), (999.0,) * times)
    with pytest.raises(LdmfastError, match=f"{times} network_times for {5 if solver == 'heun' else 3} evaluations"):
        grid.table(VP, start=start)


def test_a_grid_is_written_as_any_file_is_or_not_at_all(tmp_path: Path) -> None:
    grid, plain = TimeGrid("ddim", (1.0, 0.0), (900.0,)), tmp_path / "plain"
    plain.touch()
    grid.save(tmp_path / "grid.json")
    assert (tmp_path / "grid.json").stat().st_mode == plain.stat().st_mode
    for target in (tmp_path, tmp_path / "no" / "grid.json"):
        with pytest.raises(LdmfastError, match="cannot be written"):
            grid.save(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.json", "plain"]


@pytest.mark.parametrize("text,words", [
    ("{", "not a readable time grid"), ("[1]", "a time grid has"), ('{"solver": "ddim"}', "a time grid has"),
    ('{"solver": "dimm", "sigmas": [1, 0], "network_times": [9]}', "unknown solver"),
    ('{"solver": "ddim", "sigmas": [1, "x"], "network_times": [9]}', "sigmas is"),
    ('{"solver": "ddim", "sigmas": [1, 0], "network_times": [NaN]}', "network_times is"),
    ('{"solver": "ddim", "sigmas": [1, 0], "network_times": [9], "options": 3}', "options is"),
    ('{"solver": "ddim", "sigmas": [1, 0], "network_times": [9], "options": {"sigmas": [1]}}', "'sigmas' is no option"),
    ('{"solver": ["ddim"], "sigmas": [1, 0], "network_times": [9]}', "solver is"),
])
def test_damaged_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "grid.json"
    file.write_text(text)
    with pytest.raises(LdmfastError, match=words):
        TimeGrid.of(file)

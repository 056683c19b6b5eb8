"""Learned steps of a pipeline: the argument, the file, the settings in a PNG, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ldmfast
from ldmfast.caches import ParaStep
from ldmfast.cli import app
from ldmfast.errors import LdmfastError
from ldmfast.pipelines import read_settings
from ldmfast.pipelines.open_call import open_call
from ldmfast.samplers import TimeGrid, make_table, sample
from ldmfast.tuning import Settings

GRID = TimeGrid("dpmpp_2m", (40.0, 3.0, 0.5, 0.0), (990.0, 610.5, 200.0))
FLOW_GRID = TimeGrid("flow_euler", (1.0, 0.7, 0.2), (1000.0, 690.5, 200.0))
CAPTION = "a red circle above a blue square"


@pytest.fixture(scope="module")
def pipes() -> dict[str, ldmfast.Pipeline]:
    return {"unet": ldmfast.Pipeline.tiny(), "dit": ldmfast.Pipeline.tiny("dit")}


@pytest.mark.parametrize("network,grid", [("unet", GRID), ("dit", FLOW_GRID)])
def test_a_call_runs_the_two_lists_of_its_grid(pipes, network: str, grid: TimeGrid, tmp_path: Path) -> None:
    """Its loop is the table of these levels, its network is told these times, and its PNG repeats it."""
    pipe = pipes[network]
    opened = open_call(pipe, CAPTION, grid=grid, generator=3)
    wanted = make_table(pipe.schedule, grid.solver, sigmas=grid.sigmas, guidance=3.0)
    assert (opened.table.matrices == wanted.matrices).all()
    assert opened.table.network_times.tolist() == list(grid.network_times)
    out = pipe(CAPTION, grid=grid, generator=3, progress=False)
    latents = pipe(CAPTION, grid=grid, generator=3, progress=False, output_type="latent").images
    torch.testing.assert_close(sample(opened.denoise, opened.x, table=opened.table), latents)
    grid.save(tmp_path / "grid.json")
    file = out.save(tmp_path / "a.png")[0]
    for again in (pipe(CAPTION, grid=tmp_path / "grid.json", generator=3, progress=False),
                  pipe.repeat(read_settings(file), progress=False)):
        assert again.images[0].tobytes() == out.images[0].tobytes()


def test_a_grid_is_the_only_word_on_the_steps(pipes) -> None:
    for network, grid in (("unet", GRID), ("dit", FLOW_GRID)):
        for more in ({"num_inference_steps": 4}, {"sigmas": [1.0]}, {"solver": "ddim"}):
            with pytest.raises(LdmfastError, match="leave it out"):
                pipes[network](CAPTION, grid=grid, **more)
    with pytest.raises(LdmfastError, match="rectified flow"):
        pipes["dit"](CAPTION, grid=TimeGrid("ddim", (4.0, 0.0), (900.0,)))


def test_half_a_picture_runs_the_end_of_a_grid(pipes) -> None:
    """Image to image of strength 2/3 leaves the first of three steps out, with its network time."""
    picture = pipes["unet"](CAPTION, num_inference_steps=2, generator=0, progress=False).images[0]
    opened = open_call(pipes["unet"], CAPTION, image=picture, strength=0.67, grid=GRID, generator=0)
    assert opened.table.network_times.tolist() == [610.5, 200.0]


def test_the_command_learns_steps_that_the_next_one_draws_with(tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = run(app, ["tune-steps", "--steps", "3", "--pictures", "2", "--iterations", "1", "--out",
                    str(tmp_path / "grid.json")])
    assert out.exit_code == 0, out.output
    grid = TimeGrid.of(tmp_path / "grid.json")
    assert grid.solver == "dpmpp_2m" and grid.evaluations == 3 and grid.guidance_scale == 3.0
    assert grid.error is not None and grid.default_error is not None and grid.error < grid.default_error
    drawn = run(app, ["generate", CAPTION, "--seed", "1", "--quiet", "--grid", str(tmp_path / "grid.json"), "--out",
                      str(tmp_path / "a.png")])
    assert drawn.exit_code == 0 and "3 steps, dpmpp_2m" in drawn.output, drawn.output
    assert read_settings(tmp_path / "a.png")["grid"] == grid.to_dict()
    missing = run(app, ["tune-steps", "--out", str(tmp_path / "no" / "grid.json")])
    assert missing.exit_code == 2 and "does not exist" in missing.output


@pytest.mark.parametrize("call,words", [
    ({"cache": ldmfast.caches.DeepCache(interval=2)}, "without a cache"),
    ({"guidance": [ldmfast.guidance.APG(momentum=-0.5)]}, "without its momentum"),
    *(({name: value}, f"{name} has no place") for name, value in [
        ("image", torch.zeros(1, 3, 64, 64)), ("strength", 0.5), ("generator", 3), ("settings", "auto"),
        ("callback_on_step_end", print), ("num_inference_steps", 4)]),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_what_steps_are_not_learned_with_is_refused(pipes, call, words: str) -> None:
    with pytest.raises(LdmfastError, match=words):
        pipes["unet"].learn_grid(pictures=1, **call)


def test_the_fine_solve_is_finer_than_any_grid(pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def asked(*_, num_inference_steps: int, **__) -> None:
        raise Asked(num_inference_steps)

    monkeypatch.setattr("ldmfast.pipelines.learn_grid.open_call", asked)
    for steps, fine in ((6, 64), (64, 512)):
        with pytest.raises(Asked, match=str(fine)):
            pipes["unet"].learn_grid(CAPTION, steps, pictures=1)
    with pytest.raises(LdmfastError, match="reference_steps=6 "):
        pipes["unet"].learn_grid(CAPTION, 6, pictures=1, reference_steps=6)


@pytest.mark.parametrize("call,name", [
    ({"settings": Settings(steps=2)}, "settings"), ({"cache": ParaStep()}, "ParaStep"),
    ({"image": torch.zeros(1, 3, 64, 64), "mask_image": torch.ones(1, 1, 64, 64)}, "mask_image"),
    ({"callback_on_step_end": print}, "callback_on_step_end"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_call_that_is_more_than_its_loop_is_not_opened(pipes, call, name: str) -> None:
    with pytest.raises(LdmfastError, match=f"{name} has no place"):
        open_call(pipes["unet"], CAPTION, **call)
    assert not pipes["unet"].siblings


@pytest.mark.parametrize("times", [(1001.0, 500.0, 1.0), (990.0, 610.5, -3.0)], ids=str)
def test_times_that_no_network_knows_are_refused(pipes, times) -> None:
    for network, grid in (("unet", GRID), ("dit", FLOW_GRID)):
        with pytest.raises(LdmfastError, match="leave the schedule's 0 to 1000"):
            pipes[network](CAPTION, grid=replace(grid, network_times=times))

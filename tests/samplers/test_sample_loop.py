"""The loop and the table's operations: same numbers as the plain reading of the table, and what users rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampler_oracles import SHAPE, network, noises, relative_error, unfold

from ldmfast.errors import CheckpointError, LdmfastError, ShapeError
from ldmfast.samplers import (
    CLASS_TO_SOLVER,
    SOLVERS,
    Schedule,
    StopSampling,
    make_table,
    sample,
    solver_of,
    start_step,
)
from ldmfast.samplers.configs import ALIASES, CLASS_DEFAULTS
from ldmfast.samplers.sample import compile_table

FLOW = Schedule(flow=True, prediction_type="flow_prediction", shift=3.0)


def schedule_for(solver: str) -> Schedule:
    return FLOW if solver.startswith("flow") else Schedule()


def by_stage(noise):
    return lambda stage, x: noise[stage].to(x.dtype)


@pytest.mark.parametrize("solver", SOLVERS)
def test_loop_equals_table(solver: str) -> None:
    """float64, to the rounding of sums taken in another order (a few ulps of 12 steps)."""
    table = make_table(schedule_for(solver), solver, 12)
    x, noise = noises(1)[0] * 2, noises(40, 3)
    expected = unfold(table, x, lambda a, t, i: network(a, t), noise)
    ends = [s for s, end in zip(expected, table.step_end) if end]
    seen = []
    result = sample(lambda a, t, i: network(a, t), x, table=table, noise_fn=by_stage(noise),
                    callback=lambda step, t, x: seen.append(x))
    assert relative_error([result], [expected[-1]]) < 1e-13
    assert len(seen) == table.num_steps == 12
    assert relative_error(seen, ends) < 1e-13


def test_registers_that_nobody_reads_are_not_made() -> None:
    """The table keeps every register (diffusers' ``model_outputs``); the runner computes what a later stage reads."""
    table = make_table(Schedule(), "dpmpp_2m", 6)
    stages = compile_table(table).stages
    assert table.matrices[-1, 1].any()
    assert [len(s.combinations) for s in stages] == [2] * 4 + [1, 1]  # the last step is of order 1: no history
    first_order = make_table(Schedule(), "dpmpp_2m", 6, order=1)
    assert all(len(s.combinations) == 1 and not s.moves for s in compile_table(first_order).stages)


@pytest.mark.parametrize("solver", SOLVERS)
def test_x0_rows_are_the_data_prediction(solver: str) -> None:
    """The picture a stage predicts: from x = a x0 + s eps and the exact eps it is x0."""
    table = make_table(schedule_for(solver), solver, 5)
    if solver in ("pndm", "flow_euler", "flow_heun"):
        assert not table.x0_rows.any()  # steps in the noise or the velocity alone
        return
    picture, eps = noises(2)
    for stage in np.flatnonzero(np.append(True, table.step_end[:-1])):
        a, s = table.noise_levels[table.step_index[stage]]
        values = dict(zip(table.columns, [a * picture + s * eps, eps]))
        row = dict(zip(table.columns, table.x0_rows[stage]))
        assert not any(row[c] for c in table.columns[2:])
        assert (row["x"] * values["x"] + row["e"] * eps - picture).abs().max() < 1e-10


@pytest.mark.parametrize("solver", SOLVERS)
def test_folded_guidance_equals_combining_first(solver: str) -> None:
    table = make_table(schedule_for(solver), solver, 6)
    x, noise = noises(1)[0], noises(40, 3)
    scales = [1.0 + 0.7 * (i % 3) for i in range(table.num_stages)]

    def pair(a, t, i):
        return network(a, t + 31), network(a, t)

    def combined(a, t, i):
        uncond, cond = pair(a, t, i)
        return uncond + scales[i] * (cond - uncond)

    def lazy(a, t, i):
        assert guided.needs_prediction[i].tolist() == [scales[i] != 1, True]
        return pair(a, t, i) if scales[i] != 1 else network(a, t)

    expected = unfold(table, x, combined, noise)[-1]
    guided = table.with_guidance(scales)
    assert relative_error([sample(lazy, x, table=guided, noise_fn=by_stage(noise))], [expected]) < 1e-12
    assert table.with_guidance(1.0) is table


def test_clipped_tables_guide_too() -> None:
    for schedule in (Schedule(clip_sample=True), Schedule(thresholding=True, sample_max_value=1.5)):
        table = make_table(schedule, "ddim", 5)
        x = noises(1)[0]
        expected = unfold(table, x, lambda a, t, i: 2.5 * network(a, t) - 1.5 * network(a, t + 31))[-1]
        result = sample(lambda a, t, i: (network(a, t + 31), network(a, t)), x, table=table, guidance=2.5)
        assert relative_error([result], [expected]) < 1e-12


@pytest.mark.parametrize("solver", ["ddpm", "euler_a", "dpmpp_2m_sde", "lcm", "unipc", "heun"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_picture_alone_equals_the_picture_in_a_batch(solver: str, dtype: torch.dtype) -> None:
    table = make_table(Schedule(), solver, 5)
    x = torch.stack([n[0] for n in noises(3, 5)]).to(dtype) * table.init_noise_sigma

    def run(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(100 + r) for r in rows]
        return sample(lambda a, t, i: torch.sin(a), x[rows], table=table, generator=generators)

    together = run([0, 1, 2])
    assert together.dtype == dtype
    for row in range(3):
        assert torch.equal(run([row])[0], together[row])


def test_one_generator_draws_the_batch_in_fp32() -> None:
    """A single generator draws the whole batch at once, as diffusers does, in fp32 whatever the state's dtype."""
    table = make_table(Schedule(), "ddpm", 2)
    x = torch.zeros(SHAPE, dtype=torch.float64)
    result = sample(lambda a, t, i: torch.zeros_like(a), x, table=table, generator=torch.Generator().manual_seed(1))
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).double()
    first = float(table.matrices[0, 0, table.columns.index("noise")])
    second = float(table.matrices[1, 0, 0])
    assert torch.allclose(result, second * first * drawn, rtol=1e-12, atol=0)


def test_zero_coefficients_read_nothing() -> None:
    """At guidance scale 1 the unconditional output may be NaN or missing; registers start unread."""
    table = make_table(Schedule(), "dpmpp_2m", 4).with_guidance([1.0, 2.0, 1.0, 1.0])

    def predict(a, t, i):
        cond = network(a, t)
        return (torch.full_like(a, float("nan")) if i != 1 else 0.5 * cond, cond)

    result = sample(predict, noises(1)[0], table=table)
    assert torch.isfinite(result).all()
    missing = sample(lambda a, t, i: (None if i != 1 else 0.5 * network(a, t), network(a, t)), noises(1)[0],
                     table=table)
    assert torch.equal(result, missing)


def test_stop_returns_the_state_reached() -> None:
    seen = []

    def callback(step, t, x):
        seen.append(x)
        if step == 2:
            raise StopSampling

    result = sample(lambda a, t, i: network(a, t), noises(1)[0], Schedule(), "heun", 10, callback=callback)
    assert len(seen) == 3
    assert torch.equal(result, seen[-1])


def test_callback_may_replace_x() -> None:
    table = make_table(Schedule(), "dpmpp_2m", 5)
    x, other = noises(2)
    result = sample(lambda a, t, i: a * 0.1, x, table=table, callback=lambda s, t, x: other if s == 4 else None)
    assert torch.equal(result, other)
    with pytest.raises(ShapeError, match="callback"):
        sample(lambda a, t, i: a * 0.1, x, table=table, callback=lambda s, t, x: x[:1])


def test_separate_network_times() -> None:
    for solver, stages in (("ddim", 4), ("heun", 7)):
        times = [901.5, 700.0, 350.25, 10.0]
        table = make_table(Schedule(), solver, 4, network_times=times)
        plain = make_table(Schedule(), solver, 4)
        seen: list[float] = []
        sample(lambda a, t, i, seen=seen: seen.append(t) or a, noises(1)[0], table=table)
        assert seen == [times[s] for s in table.step_index]
        assert len(seen) == stages
        assert np.array_equal(table.matrices, plain.matrices)
    assert make_table(Schedule(), "heun", 4, network_times=range(7)).network_times.tolist() == list(range(7))


def test_noise_levels_at_every_boundary() -> None:
    """Boundary k of a run of N steps is where step k starts; image to image starts at the same level."""
    source, noise = noises(2)
    for solver in SOLVERS:
        table = make_table(schedule_for(solver), solver, 8)
        assert table.noise_levels.shape == (9, 2)
        assert table.noise_levels[8].tolist() == [1.0, 0.0]
        assert torch.equal(table.add_noise(source, noise, 8), source)
        late = make_table(schedule_for(solver), solver, 8, strength=0.5)
        assert late.start == 4 and late.num_steps == 4
        assert np.array_equal(late.noise_levels, table.noise_levels[4:])
        assert np.array_equal(late.timesteps, table.timesteps[4:])
        nothing = make_table(schedule_for(solver), solver, 8, strength=0.0)
        assert torch.equal(sample(lambda a, t, i: a, source, table=nothing), source)
    a, s = make_table(Schedule(), "ddim", 8).noise_levels[2]
    assert a**2 + s**2 == pytest.approx(1)


def test_start_step_is_diffusers_get_timesteps() -> None:
    assert [start_step(20, s) for s in (1.0, 0.8, 0.33, 0.04, 0.0)] == [0, 4, 14, 20, 20]
    assert [start_step(20, s, flow=True) for s in (1.0, 0.33, 0.0)] == [0, 13, 20]


def test_class_defaults_are_those_of_diffusers() -> None:
    """Every key and default of CLASS_DEFAULTS against the constructor's signature."""
    import inspect

    import diffusers

    assert set(CLASS_DEFAULTS) | set(ALIASES) == set(CLASS_TO_SOLVER)
    for name, defaults in CLASS_DEFAULTS.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        theirs = {k: p.default for k, p in parameters.items() if k not in ("self", "kwargs")}
        assert {k: list(v) if isinstance(v, list) else v for k, v in theirs.items()} == defaults, name


SD15 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}


@pytest.mark.parametrize("name", [n for n in CLASS_DEFAULTS if not n.startswith("FlowMatch")])
def test_switching_the_solver_is_diffusers_from_config(name: str) -> None:
    """An SD 1.5 folder's config under another solver: timesteps as OtherScheduler.from_config makes them."""
    import diffusers

    theirs = getattr(diffusers, name).from_config(SD15)
    theirs.set_timesteps(12)
    table = make_table(Schedule.from_config(SD15), CLASS_TO_SOLVER[name], 12)
    assert np.abs(table.network_times - theirs.timesteps.double().numpy()).max() < 1e-3


def test_configs_that_cannot_be_followed_are_refused() -> None:
    base = {"_class_name": "DDPMScheduler"}
    for config, words in [
        ({"_class_name": "VQDiffusionScheduler"}, "_class_name"),
        ({**base, "variance_type": "learned_range"}, "variance_type"),
        ({**base, "beta_schedule": "wiggly"}, "beta_schedule"),
        ({**base, "prediction_type": "score"}, "prediction_type"),
        ({**base, "new_fancy_rule": 3}, "new_fancy_rule"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_p": {"a": 1}}, "solver_p"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, "both"),
        ({**base, "trained_betas": [0.1, 0.2]}, "trained_betas"),
    ]:
        with pytest.raises(CheckpointError, match=words) as error:
            Schedule.from_config(config)
        assert "\n" not in str(error.value)


def test_solver_of_a_config() -> None:
    dpm = {"_class_name": "DPMSolverMultistepScheduler"}
    assert solver_of(SD15) == "pndm"
    assert solver_of(dpm) == "dpmpp_2m"
    assert solver_of({**dpm, "algorithm_type": "sde-dpmsolver++"}) == "dpmpp_2m_sde"
    assert solver_of({**dpm, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}) == "dpmpp_3m_sde"


BAD = [
    ({"solver": "dpmpp2m", "steps": 5}, "dpmpp_2m"),
    ({"solver": "ddim", "steps": 0}, "steps=0"),
    ({"solver": "euler", "steps": -3}, "steps=-3"),
    ({"solver": "ddim", "steps": 1.5}, "steps=1.5"),
    ({"solver": "ddim", "steps": 1001}, "1001"),
    ({"solver": "dpmpp_2m", "steps": 1000}, "1000"),
    ({"solver": "ddim"}, "needs steps"),
    ({"solver": "ddim", "timesteps": [100, 200]}, "fall strictly"),
    ({"solver": "ddim", "timesteps": [1000, 200]}, "not in"),
    ({"solver": "ddim", "timesteps": []}, "timesteps"),
    ({"solver": "euler", "sigmas": [3.0]}, "two values"),
    ({"solver": "euler", "sigmas": [3.0, float("nan"), 0.0]}, "not finite"),
    ({"solver": "euler", "timesteps": [500], "sigmas": [3.0, 0.0]}, "both"),
    ({"solver": "euler", "timesteps": [500], "steps": 2}, "steps=2"),
    ({"solver": "pndm", "timesteps": [500, 3]}, "does not take timesteps"),
    ({"solver": "ddim", "steps": 5, "strength": 1.1}, "strength=1.1"),
    ({"solver": "ddim", "steps": 5, "strength": -0.1}, "strength=-0.1"),
    ({"solver": "ddim", "steps": 5, "start": 6}, "start=6"),
    ({"solver": "ddim", "steps": 5, "eta": 2.0}, "eta=2.0"),
    ({"solver": "ddim", "steps": 5, "s_churn": 1.0}, "s_churn"),
    ({"solver": "ddim", "steps": 5, "network_times": [1, 2]}, "network_times"),
    ({"solver": "ddim", "steps": 5, "guidance": [1.0, 2.0]}, "guidance"),
    ({"solver": "ddim", "steps": 5, "guidance": float("nan")}, "guidance"),
    ({"solver": "ddim", "steps": 5, "mu": 1.0}, "mu=1.0"),
    ({"solver": "flow_euler", "steps": 5}, "rectified-flow"),
    ({"solver": "dpmpp_2m", "steps": 5, "order": 4}, "order=4"),
    ({"solver": "dpmpp_2m", "steps": 5, "algorithm": "dpmsolver"}, "sigma 0"),
    ({"solver": "lcm", "steps": 51}, "51"),
    ({"solver": "pndm", "steps": 3, "skip_prk_steps": False}, "too few"),
]


@pytest.mark.parametrize("arguments,words", BAD, ids=[f"{b[0]['solver']}-{b[1]}" for b in BAD])
def test_bad_input_is_one_clear_line(arguments: dict, words: str) -> None:
    with pytest.raises(LdmfastError) as error:
        make_table(Schedule(), **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_schedules_and_calls_are_one_clear_line() -> None:
    x = torch.zeros(SHAPE)
    table = make_table(Schedule(), "ddpm", 3)
    for call, words in [
        (lambda: make_table(Schedule(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "ddim", 5), "SNR"),
        (lambda: make_table(Schedule(clip_sample=True), "euler", 5), "clip_sample"),
        (lambda: make_table(FLOW, "ddim", 5), "rectified flow"),
        (lambda: make_table(Schedule(flow=True, prediction_type="flow_prediction", use_dynamic_shifting=True),
                            "flow_euler", 5), "image_seq_len"),
        (lambda: Schedule(timestep_spacing="odd"), "timestep_spacing"),
        (lambda: Schedule(prediction_type="flow_prediction"), "flow"),
        (lambda: sample(lambda a, t, i: a[:1], x, table=table), "shape"),
        (lambda: sample(lambda a, t, i: (a, a), x, table=table), "2 tensors"),
        (lambda: sample(lambda a, t, i: a, x, table=table.with_guidance(2.0)), "one tensor"),
        (lambda: sample(lambda a, t, i: a, x, table=table, generator=[torch.Generator()]), "1 generators"),
        (lambda: sample(lambda a, t, i: a, x, table=table, generator=3), "int"),
        (lambda: sample(lambda a, t, i: a, x), "schedule"),
        (lambda: table.with_guidance(2.0).with_guidance(2.0), "once"),
        (lambda: table.add_noise(x, x, 4), "boundary 4"),
    ]:
        with pytest.raises(LdmfastError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_tables_are_frozen_and_shared_between_runs() -> None:
    table = make_table(Schedule(), "unipc", 6)
    with pytest.raises(ValueError):
        table.matrices[0, 0, 0] = 1
    x = noises(1)[0]
    first, second = (sample(lambda a, t, i: network(a, t), x, table=table) for _ in range(2))
    assert torch.equal(first, second)

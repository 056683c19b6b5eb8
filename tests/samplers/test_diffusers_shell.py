"""The shell's schedulers against diffusers' of the same name: as they are, in float32, one line of code apart."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import json
import math
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from sampler_oracles import float64_tables, given_noise, network, noises
from test_sampler_parity import EXTRA, SCALED, refused, variants
from torch import Tensor

import ldmfast
from ldmfast import LdmfastError
from ldmfast.samplers import diffusers_shell
from ldmfast.samplers.configs import CLASS_DEFAULTS
from ldmfast.samplers.diffusers_shell import SchedulerError

NAMES = [name for name in diffusers_shell.__all__ if name != "SchedulerError"]
SIGMA_SPACE = ("Euler", "Heun", "LMS", "KDPM2")
INTEGER_TIMES = ("DDIM", "DDPM", "PNDM", "DPM", "DEIS", "UniPC", "LCM", "TCD")
TINY = Path(ldmfast.__file__).parent / "assets" / "tiny"
AGREEMENT = 1e-5
# diffusers divides by a small sigma (Heun, DPM2) or a small difference of logarithms (DEIS of order 3) in float32
DIVIDE_BY_SMALL = ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
                   "DEISMultistepScheduler")


def config_of(name: str) -> dict:
    return {} if name.startswith("FlowMatch") else dict(SCALED)


def pair(name: str, config: dict, set_kwargs: dict) -> tuple[Any, Any]:
    """(diffusers' scheduler, ours), set up alike."""
    made = []
    for module in (diffusers, diffusers_shell):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = getattr(module, name)(**config)
            scheduler.set_timesteps(**set_kwargs)
        made.append(scheduler)
    return made[0], made[1]


def start(shape: tuple[int, ...] = (2, 3, 4, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def walk(scheduler: Any, times: Any, *, dtype: torch.dtype = torch.float32, scale: float = 3.0,
         **step_kwargs: Any) -> list[tuple]:
    """The outputs of ``step`` along ``times``, each a tuple, from a fixed start, with a seeded generator."""
    x = (start() * scale).to(dtype)
    if "generator" in type(scheduler).step.__code__.co_varnames:
        step_kwargs["generator"] = torch.Generator().manual_seed(11)
    outputs = []
    for t in times:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = scheduler.step(network(seen, float(t)), t, x, return_dict=False, **step_kwargs)
        outputs.append(out)
        x = out[0]
    return outputs


def difference(ours: list[tuple], theirs: list[tuple], dtypes: bool = True) -> float:
    """Largest difference of any output at any step, relative to the tensor's size (at least 1)."""
    assert [len(o) for o in ours] == [len(t) for t in theirs]
    worst = 0.0
    for a, b in zip((o for out in ours for o in out), (t for out in theirs for t in out)):
        assert a.shape == b.shape and (a.dtype == b.dtype or not dtypes)
        assert torch.isfinite(b).all(), "diffusers has no finite answer"
        worst = max(worst, float((a.double() - b.double()).abs().max() / max(1.0, float(b.abs().max()))))
    return worst


def agree(name: str, config: dict, set_kwargs: dict, begin: int = 0) -> float:
    """The largest difference to diffusers; asserts that it is at most 1e-5, but for diffusers' own rounding. NaN where
    diffusers has no finite answer (steps of length zero); ours must be finite there too."""
    theirs, ours = pair(name, config, set_kwargs)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.timesteps.dtype == theirs.timesteps.dtype
    a, b = walk_from(ours, begin), walk_from(theirs, begin)
    assert all(torch.isfinite(o).all() for out in a for o in out)
    if not all(torch.isfinite(o).all() for out in b for o in out):
        return math.nan
    error = difference(a, b)
    if error > AGREEMENT:
        # diffusers rounds its coefficients to float32, and forms (x - (x - sigma e)) / sigma, which loses x / sigma
        # ulps. Oracle: its own code in float64 over the same abar. We must agree with that, and with diffusers as it
        # is up to what it loses, and as much again, as the error of a step passes through the network of the next
        exact = wide(name, config, set_kwargs)
        theirs, ours = pair(name, config, set_kwargs)
        # truncation to whole timesteps may fall either way; the network must see the same
        exact.timesteps = theirs.timesteps
        reference = walk_from(exact, begin, torch.float64)
        lost = difference(walk_from(theirs, begin, torch.float32), reference, dtypes=False)
        assert difference(walk_from(ours, begin, torch.float64), reference) <= AGREEMENT, f"{name}, {config}"
        assert error <= AGREEMENT + 2 * lost, f"{name}, {config}: {error:.1e}, diffusers loses {lost:.1e}"
    return error


def wide(name: str, config: dict, set_kwargs: dict) -> Any:
    """diffusers' scheduler with float64 tables, made from its own float32 abar."""
    cls = getattr(diffusers, name)
    narrow = cls(**config)
    with float64_tables(cls):
        scheduler = cls(**config)
        for key in ("alphas_cumprod", "final_alpha_cumprod"):
            if hasattr(scheduler, key):
                setattr(scheduler, key, getattr(narrow, key).double())
        scheduler.set_timesteps(**set_kwargs)
    return scheduler


def walk_from(scheduler: Any, begin: int, dtype: torch.dtype | None = None) -> list[tuple]:
    """``walk`` from an index, from the scheduler's own noise level. With a dtype: on given noise, and diffusers'
    upcasts to float32 go to that dtype."""
    name, parent = type(scheduler).__name__, getattr(scheduler, "_parent", type(scheduler))
    scale = 1.0 if name.startswith("FlowMatch") else float(getattr(scheduler, "init_noise_sigma", 1.0))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    source = itertools.cycle(noises(100, seed=8))
    with contextlib.ExitStack() as stack:
        if dtype == torch.float64:
            stack.enter_context(float64_tables(parent))
        for module in (parent, diffusers_shell.base.TableScheduler) if dtype else ():
            stack.enter_context(given_noise(module, lambda: next(source).to(dtype)))
        return walk(scheduler, scheduler.timesteps[begin:], scale=scale, dtype=dtype or torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_agrees_with_diffusers(name: str) -> None:
    """The grid of test_sampler_parity, through ``step``: prediction types, spacings, sigma options, orders, ..."""
    limit = {"DPMSolverMultistepScheduler": 150, "UniPCMultistepScheduler": 150, "HeunDiscreteScheduler": 20,
             "LMSDiscreteScheduler": 20, "KDPM2DiscreteScheduler": 12, "KDPM2AncestralDiscreteScheduler": 12}
    worst, count, above = 0.0, 0, 0
    for i, config in enumerate(variants(name, limit.get(name, 60))):
        if refused(config):
            continue
        runge_kutta = name == "PNDMScheduler" and not config["skip_prk_steps"]
        steps = (4, 5, 20)[i % 3] if runge_kutta else (2, 3, 5, 20, 50)[i % 5]
        error = agree(name, config, {"num_inference_steps": steps})
        if not math.isnan(error):
            worst, count, above = max(worst, error), count + 1, above + (error > AGREEMENT)
    assert count >= 2 and (above == 0 or name in DIVIDE_BY_SMALL)
    print(f"{name}: {count} runs, largest difference {worst:.1e}, {above} above 1e-5 by diffusers' rounding")


@pytest.mark.parametrize("name,config,steps,set_kwargs", [case[:4] for case in EXTRA],
                         ids=[f"{i}-{case[0]}" for i, case in enumerate(EXTRA)])
def test_other_settings_agree_with_diffusers(name: str, config: dict, steps: int | None, set_kwargs: dict) -> None:
    given = {"num_inference_steps": steps} if steps else {}
    agree(name, config, {**given, **set_kwargs})


@pytest.mark.parametrize("name", NAMES)
def test_late_start_agrees_with_diffusers(name: str) -> None:
    """Image to image as pipelines do it, also where diffusers' PNDM and LMS lose something by it."""
    order = getattr(diffusers, name).order
    agree(name, config_of(name), {"num_inference_steps": 10}, begin=6 * order)


@pytest.mark.parametrize("name,kwargs", [
    ("DDIMScheduler", {"eta": 0.5}), ("DDIMScheduler", {"eta": 1.0, "use_clipped_model_output": True}),
    ("DDIMScheduler", {"eta": 0.7, "generator": None, "variance_noise": torch.linspace(-1, 1, 120).view(2, 3, 4, 5)}),
    ("EulerDiscreteScheduler", {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01}),
    ("LMSDiscreteScheduler", {"order": 2}), ("LMSDiscreteScheduler", {"order": 1})])
def test_arguments_of_step_agree_with_diffusers(name: str, kwargs: dict) -> None:
    theirs, ours = pair(name, config_of(name), {"num_inference_steps": 12})
    fixed = "variance_noise" in kwargs
    outputs = []
    for scheduler in (ours, theirs):
        x, g, out = start() * 3, torch.Generator().manual_seed(5), []
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            extra = kwargs if fixed or name.startswith("LMS") else {**kwargs, "generator": g}
            out.append(scheduler.step(network(seen, float(t)), t, x, **extra, return_dict=False))
            x = out[-1][0]
        outputs.append(out)
    assert difference(*outputs) <= AGREEMENT


def test_dpm_variance_noise_replaces_the_draw() -> None:
    config = {**SCALED, "algorithm_type": "sde-dpmsolver++"}
    theirs, ours = pair("DPMSolverMultistepScheduler", config, {"num_inference_steps": 8})
    noise = torch.linspace(-2, 2, 120).view(2, 3, 4, 5)
    assert difference(walk(ours, ours.timesteps, variance_noise=noise),
                      walk(theirs, theirs.timesteps, variance_noise=noise)) <= AGREEMENT


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_steps_of_any_timestep_in_any_order(name: str) -> None:
    """DDIM, DDPM and PNDM take the timestep's word, whatever came before and whether it is in the list or not."""
    config = {**SCALED, "skip_prk_steps": True} if name == "PNDMScheduler" else SCALED
    theirs, ours = pair(name, config, {"num_inference_steps": 20})
    listed = name == "DDPMScheduler"
    order = np.random.default_rng(0).permutation(20 if listed else 999)[:12]
    times = [int(theirs.timesteps[i]) if listed else int(i) for i in order]
    assert difference(walk(ours, times), walk(theirs, times)) <= AGREEMENT


def test_ddpm_steps_singly_without_timesteps() -> None:
    theirs, ours = diffusers.DDPMScheduler(**SCALED), diffusers_shell.DDPMScheduler(**SCALED)
    times = [999, 3, 500, 1, 0, 42]
    assert difference(walk(ours, times), walk(theirs, times)) <= AGREEMENT


def test_ddpm_noise_of_single_steps() -> None:
    """All training steps: diffusers' own full loop came out 2e-2 off in its sum of 388 when beta = 1 - abar / abar' was
    formed in float64, where diffusers rounds the ratio to float32."""
    theirs, ours = pair("DDPMScheduler", {"clip_sample": False}, {"num_inference_steps": 1000})
    zero = torch.zeros(2, 3, 4, 5)
    for t in theirs.timesteps[-40:-1]:
        # of zeros the step leaves the noise alone, so its deviation is seen to a few ulps (square root, two products)
        a, b = (s.step(zero, t, zero, generator=torch.Generator().manual_seed(int(t)), return_dict=False)[0]
                for s in (ours, theirs))
        assert b.abs().max() > 0 and (a - b).abs().max() <= 6 * 2.0**-24 * float(b.abs().max())


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("DDIM", "DDPM", "PNDM"))])
def test_the_first_step_may_be_anywhere(name: str) -> None:
    """The step index is found from the timestep: three steps from every place of the list, last place first."""
    order = getattr(diffusers, name).order
    theirs, ours = pair(name, config_of(name), {"num_inference_steps": 9})
    for begin in reversed(range(0, len(theirs.timesteps) - order, order)):
        theirs, ours = pair(name, config_of(name), {"num_inference_steps": 9})
        times = theirs.timesteps[begin:begin + 3 * order]
        assert difference(walk(ours, times), walk(theirs, times)) <= AGREEMENT, begin
        assert ours.step_index == theirs.step_index


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_euler_steps_before_set_timesteps(name: str) -> None:
    theirs, ours = getattr(diffusers, name)(**SCALED), getattr(diffusers_shell, name)(**SCALED)
    times = theirs.timesteps[700:704]
    assert difference(walk(ours, times), walk(theirs, times)) <= AGREEMENT


@pytest.mark.parametrize("name,order", [
    ("DPMSolverMultistepScheduler", 2), ("DPMSolverMultistepScheduler", 3), ("DEISMultistepScheduler", 2),
    ("UniPCMultistepScheduler", 2), ("UniPCMultistepScheduler", 3)])
def test_repeated_timesteps(name: str, order: int) -> None:
    """As many steps as training timesteps: rounding repeats some. diffusers divides by the step of length zero; ours
    agrees until there, and takes a lower order after it."""
    config = {**SCALED, "num_train_timesteps": 25, "solver_order": order}
    theirs, ours = pair(name, config, {"num_inference_steps": 25})
    times = theirs.timesteps
    first = (times[1:] == times[:-1]).nonzero()[0].item() + 1
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(0)
    a = walk(ours, times)
    assert 5 < first < 20 and all(torch.isfinite(out[0]).all() for out in a)
    before = first - (order == 3)  # with three predictions the idle step itself is 0 / 0 in diffusers
    assert difference(a[:before], walk(theirs, times[:before])) <= AGREEMENT
    # what an idle step must not do is move the state by more than its neighbours do
    moves = [float((y[0] - x[0]).abs().max()) for x, y in itertools.pairwise(a)]
    assert max(moves[first - 2:first + 4]) <= 3 * max(moves[:first - 2])


def test_mu_without_dynamic_shifting_is_ignored_as_in_diffusers() -> None:
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
    agree("UniPCMultistepScheduler", config, {"num_inference_steps": 6, "mu": 1.5})


@pytest.mark.parametrize("name", NAMES)
def test_second_run_is_the_first(name: str) -> None:
    """``set_timesteps`` forgets everything, also after a run that was broken off in the middle."""
    ours = getattr(diffusers_shell, name)(**config_of(name))
    ours.set_timesteps(8)
    first = walk(ours, ours.timesteps)
    ours.set_timesteps(8)
    walk(ours, ours.timesteps[:3])
    ours.set_timesteps(8)
    assert difference(walk(ours, ours.timesteps), first) == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_of_the_surface_is_diffusers(name: str) -> None:
    theirs, ours = pair(name, config_of(name), {"num_inference_steps": 7})
    cls = type(ours)
    assert isinstance(ours, getattr(diffusers, name)) and cls.__name__ == name and cls.order == type(theirs).order
    assert ours.compatibles and set(ours.compatibles) == set(theirs.compatibles)
    assert len(ours) == len(theirs) and ours.num_inference_steps == theirs.num_inference_steps
    assert float(ours.init_noise_sigma if hasattr(ours, "init_noise_sigma") else 1) == float(
        theirs.init_noise_sigma if hasattr(theirs, "init_noise_sigma") else 1)
    x, noise, t = start(), start().flip(0), theirs.timesteps[2:4]
    if name.startswith("FlowMatch"):
        assert torch.equal(ours.scale_noise(x, t[:1], noise), theirs.scale_noise(x, t[:1], noise))
    else:
        assert torch.equal(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
        assert dict(ours.config) == dict(theirs.config)
    if hasattr(theirs, "get_velocity") and not name.startswith("Euler"):
        assert torch.equal(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t))
    out = ours.step(x, ours.timesteps[0], x)
    assert out.prev_sample.shape == x.shape and type(out) is type(theirs.step(x, theirs.timesteps[0], x))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_model_outputs_are_diffusers(name: str, order: int) -> None:
    theirs, ours = pair(name, {**SCALED, "solver_order": order}, {"num_inference_steps": 9})
    for count in (1, 2, 4):
        walk(theirs, theirs.timesteps[theirs.step_index or 0:][:count])
        walk(ours, ours.timesteps[ours.step_index or 0:][:count])
        assert len(ours.model_outputs) == order and ours.lower_order_nums == theirs.lower_order_nums
        for a, b in zip(ours.model_outputs, theirs.model_outputs):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a - b).abs().max() <= AGREEMENT * max(1.0, float(b.abs().max()))


def test_multistep_history_may_be_given() -> None:
    """``model_outputs`` and ``lower_order_nums`` set from outside, as diffusers' tests and some samplers do."""
    theirs, ours = pair("DPMSolverMultistepScheduler", {**SCALED, "solver_order": 3}, {"num_inference_steps": 20})
    for scheduler in (theirs, ours):
        scheduler.model_outputs = [start() * k for k in (0.1, 0.2, 0.3)]
        scheduler.lower_order_nums = 3
    times = theirs.timesteps[5:9]
    assert difference(walk(ours, times), walk(theirs, times)) <= AGREEMENT


@pytest.mark.parametrize("name", NAMES)
def test_saved_config_loads_in_plain_diffusers(name: str, tmp_path: Path) -> None:
    ours = getattr(diffusers_shell, name)(**config_of(name))
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == name
    back = getattr(diffusers, name).from_pretrained(tmp_path)
    again = getattr(diffusers_shell, name).from_pretrained(tmp_path)
    assert type(back) is getattr(diffusers, name) and type(again) is type(ours)
    assert type(getattr(diffusers_shell, name).from_config(back.config)) is type(ours)
    for scheduler in (back, again):
        settings = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        assert settings == {k: v for k, v in ours.config.items() if not k.startswith("_")}
    again.set_timesteps(6)
    ours.set_timesteps(6)
    assert difference(walk(again, again.timesteps), walk(ours, ours.timesteps)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name: str) -> None:
    ours = getattr(diffusers_shell, name)(**config_of(name))
    ours.set_timesteps(6)
    expected = walk(copy.deepcopy(ours), ours.timesteps)
    through = pickle.loads(pickle.dumps(ours))
    assert type(through) is type(ours)
    assert difference(walk(through, ours.timesteps), expected) == 0
    assert difference(walk(ours, ours.timesteps), expected) == 0


@pytest.mark.parametrize("target", [n for n in NAMES if not n.startswith(("FlowMatch", "LCM", "TCD"))])
def test_from_config_of_another_class(target: str) -> None:
    """What users do: SomeScheduler.from_config(pipe.scheduler.config), through all classes in turn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = diffusers.PNDMScheduler(**SCALED, skip_prk_steps=True, steps_offset=1)
        ours: Any = diffusers_shell.PNDMScheduler(**SCALED, skip_prk_steps=True, steps_offset=1)
        for name in ("EulerDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", target):
            theirs = getattr(diffusers, name).from_config(theirs.config)
            ours = getattr(diffusers_shell, name).from_config(ours.config)
    keys = CLASS_DEFAULTS[target]
    assert {k: ours.config[k] for k in keys} == {k: theirs.config[k] for k in keys}
    theirs.set_timesteps(6)
    ours.set_timesteps(6)
    assert difference(walk(ours, theirs.timesteps), walk(theirs, theirs.timesteps)) <= AGREEMENT


def owned(scheduler: Any) -> dict[int, str]:
    """Identities of everything mutable that a scheduler holds."""
    found: dict[int, str] = {}

    def look(value: Any, path: str) -> None:
        if isinstance(value, (Tensor, list, dict, set, np.ndarray)):
            found[id(value)] = path
        if isinstance(value, dict):
            for key, item in value.items():
                look(item, f"{path}.{key}")
        elif isinstance(value, (list, tuple)):
            for k, item in enumerate(value):
                look(item, f"{path}[{k}]")
        elif hasattr(value, "__dataclass_fields__"):
            look(vars(value), path)

    look(vars(scheduler), type(scheduler).__name__)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_two_schedulers_share_nothing(name: str) -> None:
    """Interleaved in two threads they give what each gives alone, and hold no mutable object in common."""
    make = getattr(diffusers_shell, name)
    schedulers = [make(**config_of(name)) for _ in range(2)]
    for scheduler, steps in zip(schedulers, (6, 9)):
        scheduler.set_timesteps(steps)
    alone = []
    for steps in (6, 9):
        single = make(**config_of(name))
        single.set_timesteps(steps)
        alone.append(walk(single, single.timesteps))
    results: list[Any] = [None, None]
    barrier = threading.Barrier(2)

    def run(k: int) -> None:
        barrier.wait()
        results[k] = walk(schedulers[k], schedulers[k].timesteps)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert difference(results[0], alone[0]) == 0 and difference(results[1], alone[1]) == 0
    # diffusers' config keeps the default list of its own signature
    default = {id(p.default) for p in inspect.signature(make.__init__).parameters.values()}
    common = {path for key, path in owned(schedulers[0]).items() if key in owned(schedulers[1]) and key not in default}
    assert not common


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_keeps_diffusers_dtypes(name: str) -> None:
    """The dtypes of diffusers, and one rounding of a step computed in fp32: half an ulp of the value, while the
    coefficients times the inputs are exact to far less. Noise-free classes are compared to the fp32 step."""
    theirs, ours = pair(name, config_of(name), {"num_inference_steps": 6})
    wide = getattr(diffusers_shell, name)(**config_of(name))
    wide.set_timesteps(6)
    x, e = start().half(), start().flip(0).half()
    t = theirs.timesteps[0]
    a = ours.step(e, t, x, return_dict=False)
    b = theirs.step(e, t, x, return_dict=False)
    assert a[0].dtype == b[0].dtype
    torch.manual_seed(0)
    wide_out = wide.step(e.float(), t, x.float(), return_dict=False)[0]
    if "generator" not in type(ours).step.__code__.co_varnames or name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        assert (a[0].float() - wide_out).abs().max() <= 2.0**-11 * float(wide_out.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_through_a_step(name: str) -> None:
    """Guidance by a loss differentiates through ``step``; a fused op that cut the graph would guide nothing."""
    theirs, ours = pair(name, {**config_of(name), **({"clip_sample": False} if name.startswith("DD") else {})},
                        {"num_inference_steps": 6})
    grads = []
    for scheduler in (ours, theirs):
        x, e = start().requires_grad_(), start().flip(0).requires_grad_()
        out = scheduler.step(e, scheduler.timesteps[0], x, return_dict=False)
        grads.append(torch.autograd.grad(out[-1].square().sum(), [x, e], allow_unused=True))
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None:
            assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-4 * float(b.abs().max())


def test_abar_replaced_after_construction_is_followed() -> None:
    """Some pipelines rescale ``alphas_cumprod`` in place of a config key; an old table would ignore it."""
    theirs, ours = pair("DDIMScheduler", SCALED, {"num_inference_steps": 5})
    before = walk(ours, ours.timesteps)
    for scheduler in (theirs, ours):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
    assert difference(walk(ours, ours.timesteps), walk(theirs, theirs.timesteps)) <= AGREEMENT
    assert difference(walk(ours, ours.timesteps), before) > 1e-3


def test_flux_lists_of_timesteps() -> None:
    """As the flow pipelines ask: a list of sigmas and a mu for the picture's size."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
    made = []
    for module in (diffusers, diffusers_shell):
        scheduler = module.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        times, count = retrieve_timesteps(scheduler, None, "cpu", sigmas=np.linspace(1.0, 1 / 6, 6),
                                          mu=calculate_shift(1024))
        scheduler.set_begin_index(0)
        made.append((times, walk(scheduler, times, scale=1.0)))
        assert count == 6
    assert torch.equal(made[0][0], made[1][0])
    assert difference(made[1][1], made[0][1]) <= AGREEMENT


def test_set_shift_is_followed() -> None:
    theirs, ours = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), None
    ours = diffusers_shell.FlowMatchEulerDiscreteScheduler(shift=2.0)
    for scheduler in (theirs, ours):
        scheduler.set_shift(5.0)
        scheduler.set_timesteps(7)
    assert difference(walk(ours, ours.timesteps), walk(theirs, theirs.timesteps)) <= AGREEMENT


@pytest.mark.parametrize("make,word", [
    (lambda s: s.DDPMScheduler(variance_type="learned_range"), "variance_type='learned_range'"),
    (lambda s: s.DDPMScheduler(variance_type="fixed_large_log"), "variance_type='fixed_large_log'"),
    (lambda s: s.UniPCMultistepScheduler(solver_p=diffusers.DDIMScheduler()), "solver_p="),
    (lambda s: s.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver", solver_order=3,
                                             final_sigmas_type="sigma_min"), "solver_order=3"),
    (lambda s: s.EulerDiscreteScheduler(prediction_type="original_sample"), "prediction_type='original_sample'"),
])
def test_an_option_without_a_table_is_named_at_construction(make: Any, word: str) -> None:
    with pytest.raises(LdmfastError, match=word), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(diffusers_shell)


def test_wrong_calls_are_named() -> None:
    s = diffusers_shell
    x = start()
    for scheduler in (s.DDIMScheduler(), s.PNDMScheduler(), s.DPMSolverMultistepScheduler(), s.LCMScheduler()):
        with pytest.raises(SchedulerError, match="set_timesteps first"):
            scheduler.step(x, 5, x)
    euler = s.EulerDiscreteScheduler()
    euler.set_timesteps(3)
    with pytest.raises(ValueError, match="is an integer"):
        euler.step(x, 0, x)
    for t in euler.timesteps:
        euler.step(x, t, x)
    with pytest.raises(SchedulerError, match="step 3 of 3: the run is over"):
        euler.step(x, euler.timesteps[0], x)
    euler.set_timesteps(3)
    euler.sigmas = euler.sigmas * 0.5
    with pytest.raises(SchedulerError, match="sigmas were replaced"):
        euler.step(x, euler.timesteps[0], x)
    heun = s.HeunDiscreteScheduler()
    heun.set_timesteps(5)
    heun.set_begin_index(3)
    with pytest.raises(SchedulerError, match="index 3 is the second evaluation"):
        heun.step(x, heun.timesteps[3], x)
    with pytest.raises(SchedulerError, match="num_train_timesteps=500"):
        heun.set_timesteps(5, num_train_timesteps=500)
    flow = s.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    with pytest.raises(SchedulerError, match="per_token_timesteps"):
        flow.step(x, flow.timesteps[0], x, per_token_timesteps=torch.ones(2, 3))
    flow_heun = s.FlowMatchHeunDiscreteScheduler()
    flow_heun.set_timesteps(4)
    with pytest.raises(SchedulerError, match="s_churn=1"):
        flow_heun.step(x, flow_heun.timesteps[0], x, s_churn=1.0)
    ddpm = s.DDPMScheduler()
    ddpm.set_timesteps(10)
    with pytest.raises(SchedulerError, match="timestep 5 is not one of"):
        ddpm.step(x, 5, x)
    ddim = s.DDIMScheduler()
    ddim.set_timesteps(10)
    with pytest.raises(LdmfastError, match="timestep 1000 is not in the model's"):
        ddim.step(x, 1000, x)
    with pytest.raises(SchedulerError, match="both generator and variance_noise"):
        ddim.step(x, 900, x, eta=1.0, generator=torch.Generator(), variance_noise=x)


def test_importing_ldmfast_does_not_import_diffusers() -> None:
    code = "import sys, ldmfast, ldmfast.samplers; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, **kwargs: Any) -> np.ndarray:
    g = torch.Generator().manual_seed(2)
    return pipe("a red circle", num_inference_steps=5, guidance_scale=4.0, generator=g, output_type="np",
                **kwargs).images


@pytest.mark.parametrize("image_to_image", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("FlowMatch")])
def test_pipeline_pictures_equal_diffusers(name: str, pipe: Any, image_to_image: bool) -> None:
    config, pictures, arguments = dict(pipe.scheduler.config), [], {}
    if image_to_image:
        pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        source = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
        arguments = {"image": source, "strength": 0.7}
    kept = pipe.scheduler
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    try:
        for module in (diffusers, diffusers_shell):
            pipe.scheduler = getattr(module, name).from_config(config)
            pictures.append(picture(pipe, **arguments))
    finally:
        pipe.scheduler = kept
    assert np.isfinite(pictures[0]).all() and np.ptp(pictures[0]) > 0.1
    assert np.abs(pictures[0] - pictures[1]).max() <= 1e-4


def test_saved_pipeline_names_diffusers_and_loads_there(pipe: Any, tmp_path: Path) -> None:
    kept = pipe.scheduler
    try:
        pipe.scheduler = diffusers_shell.UniPCMultistepScheduler.from_config(kept.config)
        pipe.save_pretrained(tmp_path)
    finally:
        pipe.scheduler = kept
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    back = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(back.scheduler) is diffusers.UniPCMultistepScheduler

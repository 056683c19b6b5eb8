"""CFGCache against the same written out over diffusers' network, and beside the other caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_cases import CASES, draw, follow
from torch import Tensor

import ldmfast
from ldmfast.caches import (
    FORA,
    CFGCache,
    DeepCache,
    EasyCache,
    FirstBlock,
    Guard,
    MagCache,
    PromptKV,
    Session,
    TaylorSeer,
    TeaCache,
    TGate,
    from_settings,
)

FULL = (0, 2, 3, 6)
CALL = {"num_inference_steps": 8, "generator": 4, "progress": False, "output_type": "latent"}
PROMPTS = ["a red circle above a blue square", "two green triangles"]


def forecast(order: int, step: int, held: list[tuple[int, Tensor]]) -> Tensor:
    """The Taylor series of backward differences, written out for orders 0 to 2. held: the newest first."""
    (s, d), *older = held
    if order == 0 or not older:
        return d
    (s1, d1), *oldest = older
    slope = (d - d1) / (s - s1)
    if order == 1 or not oldest:
        return d + slope * (step - s)
    s2, d2 = oldest[0]
    return d + slope * (step - s) + (slope - (d1 - d2) / (s1 - s2)) / (s - s1) * (step - s) ** 2 / 2


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", ["unet", "dit", "pixart", "sd3"])
def test_the_other_branch_follows_the_conditional_one(name: str, order: int) -> None:
    """The first picture's conditions are the unconditional branch, the second's the conditional one."""
    case = CASES[name]
    module, net = case.both()
    conditions, x = case.conditions(), draw(*case.shape)[:1]
    told = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if name == "pixart" else {}
    held: list[tuple[int, Tensor]] = []

    def expected(x: Tensor, t: float, step: int) -> Tensor:
        u, c = module(torch.cat([x, x]), timestep=torch.full((2,), t), **conditions, **told, return_dict=False)[0][
            :, :4].chunk(2)
        if step in FULL:
            held.insert(0, (step, u - c))
        else:
            u = c + forecast(order, step, held)
        return u + 3 * (c - u)

    session = Session.of([CFGCache(interval=FULL, order=order)], net, case.times)
    assert session is not None
    states = [net.prepare(case.times, **{k: v[first:] for k, v in conditions.items()}) for first in (0, 1)]
    rows: list[int] = []

    def found(x: Tensor, t: float, step: int) -> Tensor:
        def network(own: Tensor) -> Tensor:
            rows.append(len(own))
            return net(own, t, state=states[session.single(step)], cache=session)

        u, c = session.evaluate(network, torch.cat([x, x]), step, branches=2)[:, :4].chunk(2)
        return u + 3 * (c - u)

    with torch.no_grad():
        theirs = follow(expected, x, case.times)
    for step, (ours, other) in enumerate(zip(follow(found, x, case.times), theirs)):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4, msg=lambda m, s=step: f"{s}: {m}")
    assert rows == [2 if s in FULL else 1 for s in range(8)]
    assert session.evaluations == 8 and session.single_evaluations == 4


@pytest.mark.parametrize("beside", [
    [], DeepCache(interval=3), FORA(interval=2), TaylorSeer(interval=3), TaylorSeer(interval=2, on="deep", order=2),
    TaylorSeer(interval=2, on="output"), EasyCache(threshold=0.5), TGate(gate=6), [DeepCache(), FORA()],
    MagCache(ratios=(1.0, 0.99, 0.98, 0.97, 0.99, 0.98, 0.97, 0.96), threshold=0.1)], ids=str)
def test_branches_that_are_equal_stay_equal(beside: Any, tiny) -> None:
    """With the prompt as negative prompt nothing is lost, whatever else is cached: the difference is 0 throughout."""
    others = beside if isinstance(beside, list) else [beside]
    same = CALL | {"guidance_scale": 3.0, "negative_prompt": PROMPTS}
    plain = tiny["exact"](PROMPTS, **same, cache=others).images
    out = tiny["exact"](PROMPTS, **same, cache=[*others, CFGCache(interval=(0, 3, 4))])
    torch.testing.assert_close(out.images, plain, rtol=1e-3, atol=1e-3)
    assert all(n > 0 for n in out.report.single)
    real = tiny["exact"](PROMPTS, **CALL, cache=[*others, CFGCache(interval=(0, 3, 4))])
    alone = tiny["exact"](PROMPTS[1], **CALL | {"generator": [4]}, cache=[*others, CFGCache(interval=(0, 3, 4))])
    assert torch.equal(tiny["exact"](PROMPTS, **CALL | {"generator": [9, 4]}, cache=[
        *others, CFGCache(interval=(0, 3, 4))]).images[1:], alone.images)  # a picture's bits are its own
    assert not torch.equal(real.images, tiny["exact"](PROMPTS, **CALL, cache=others).images)


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_it_is_nearer_than_no_guidance_and_reported(precision: str, tiny) -> None:
    pipe, call = tiny[precision], CALL | {"num_inference_steps": 20, "solver": "ddim"}
    full = pipe(PROMPTS, **call).images
    out = pipe(PROMPTS, **call, cache=CFGCache(interval=2))
    without = pipe(PROMPTS, **call, guidance_scale=1).images
    assert (out.images - full).norm() < 0.2 * (without - full).norm()
    between = range(2, 20, 2)
    assert set(out.report.evaluations) == {20} and set(out.report.single) == {len(between)}
    assert out.report.decisions[0] == tuple("guidance" if s in between else "" for s in range(20))
    assert from_settings(out.settings[0]["cache"]) == (CFGCache(interval=2),)


def test_without_guidance_it_leaves_nothing_out(tiny) -> None:
    call = CALL | {"guidance_scale": 1}
    out = tiny["exact"](PROMPTS[0], **call, cache=CFGCache(interval=4))
    assert torch.equal(out.images, tiny["exact"](PROMPTS[0], **call).images) and out.report.single == (0,)


@pytest.mark.parametrize("policy", [TeaCache(), FirstBlock(), Guard(policy=FirstBlock(), limit=1.0)], ids=str)
def test_what_decides_by_all_branches_is_refused(policy: Any, tiny) -> None:
    with pytest.raises(ldmfast.LdmfastError, match="CFGCache runs one"):
        tiny["exact"](PROMPTS[0], **CALL, cache=[policy, CFGCache()])


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"interval": (1, 2)}, {"order": 4}, {"order": -1}, {"first": 1.5},
                                   {"interval": "2"}], ids=str)
def test_bad_input(wrong: dict[str, Any]) -> None:
    with pytest.raises(ldmfast.LdmfastError, match=next(iter(wrong))):
        CFGCache(**wrong)


def test_the_text_of_a_joint_transformer_beside_it() -> None:
    """PromptKV's keys and values have rows of both branches; the conditional ones are taken where it runs alone."""
    case = CASES["sd3"]
    net = case.both()[1]
    conditions, x = case.conditions(), draw(*case.shape)[:1]
    both = {k: torch.cat([v[1:], v[1:]]) for k, v in conditions.items()}
    states = [net.prepare(case.times, **{k: v[first:] for k, v in both.items()}) for first in (0, 1)]

    def run(*policies: Any) -> list[Tensor]:
        session = Session.of(policies, net, case.times)
        assert session is not None
        return follow(lambda x, t, step: session.evaluate(
            lambda own: net(own, t, state=states[session.single(step)], cache=session), torch.cat([x, x]), step,
            branches=2)[:1], x, case.times)

    plain = run(PromptKV(interval=3))
    for ours, other in zip(run(PromptKV(interval=3), CFGCache(interval=FULL)), plain):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)

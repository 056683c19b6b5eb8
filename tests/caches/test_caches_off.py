"""A policy that never reuses changes no bit, and one that does reuse changes something."""

from __future__ import annotations

import pytest
import torch
from cache_cases import CASES, with_cache, without_cache

import ldmfast
from ldmfast.caches import (
    FORA,
    PAB,
    CFGCache,
    DeepCache,
    EasyCache,
    FirstBlock,
    MagCache,
    ParaStep,
    Policy,
    PromptKV,
    TaylorSeer,
    TeaCache,
    TGate,
)

# each policy as it computes everything, and as it does not
PAIRS: dict[str, tuple[Policy, Policy]] = {
    "DeepCache": (DeepCache(interval=1), DeepCache(interval=2)),
    "FORA": (FORA(interval=1), FORA(interval=2)),
    "PAB": (PAB(self_range=1, cross_range=1), PAB(self_times=(0, 1000), cross_times=(0, 1000))),
    "TGate": (TGate(gate=99), TGate(gate=3)),
    "PromptKV": (PromptKV(interval=1), PromptKV(interval=2)),
    "FirstBlock": (FirstBlock(threshold=0), FirstBlock(threshold=9)),
    "TeaCache": (TeaCache(threshold=0), TeaCache(threshold=9)),
    "MagCache": (MagCache(ratios=[1.0], threshold=0), MagCache(ratios=[1.0])),
    "EasyCache": (EasyCache(threshold=0), EasyCache(threshold=9, warmup=2)),
    **{f"TaylorSeer {on} {order}": (TaylorSeer(interval=1, order=order, on=on), TaylorSeer(order=order, on=on))
       for on, order in (("layers", 1), ("deep", 2), ("stack", 3), ("output", 0))},
}
LACKS = {("dit", "DeepCache"), ("dit", "TGate"), ("dit", "PromptKV"), ("pixart", "DeepCache"), ("sd3", "DeepCache"),
         ("sd3", "TGate"), ("flux", "DeepCache"), ("flux", "TGate"), ("dit", "TaylorSeer deep 2"),
         ("pixart", "TaylorSeer deep 2"), ("sd3", "TaylorSeer deep 2"), ("flux", "TaylorSeer deep 2")}
INERT = {("unet", "PromptKV"), ("pixart", "PromptKV")}  # their prompts' keys and values are computed once anyway


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_reuse_is_no_cache(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    net = case.both(dtype)[1]
    expected = without_cache(net, case)
    for policy, (off, on) in PAIRS.items():
        if (name, policy) in LACKS:
            with pytest.raises(ldmfast.LdmfastError, match="does not have"):
                with_cache(net, case, off)
            continue
        found, session = with_cache(net, case, off)
        assert all(map(torch.equal, found, expected)), policy
        assert session.evaluations == len(expected) and not session.reused and not session.forecast, policy
        found, session = with_cache(net, case, on)
        if (name, policy) in INERT:
            assert all(map(torch.equal, found, expected)), policy
        else:
            assert not torch.equal(found[-1], expected[-1]), policy
            assert session.store.peak > 0 and session.reused.total() + session.forecast.total() > 0, policy
            assert all(torch.isfinite(y).all() for y in found), policy


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("off", [*(off for off, _ in PAIRS.values()), CFGCache(interval=1), ParaStep(ranks=1)],
                         ids=repr)
def test_no_reuse_is_no_cache_in_a_pipeline(tiny, off: Policy, precision: str) -> None:
    """Guidance, two pictures, and a multistep solver."""
    call = {"num_inference_steps": 4, "generator": 3, "output_type": "latent", "solver": "dpmpp_2m", "progress": False}
    prompts = ["a red circle", "two blue squares"]
    expected = tiny[precision](prompts, **call).images
    out = tiny[precision](prompts, **call, cache=off)
    assert torch.equal(out.images, expected)
    assert set(out.report.evaluations) == {4} and out.report.critical_path == 4

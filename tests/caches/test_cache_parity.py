"""Every policy against the same idea in diffusers: its own caches where it has them, else hooks on its layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cache_cases import CASES, TIMES, theirs, with_cache
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import (
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

from ldmfast.caches import FORA, PAB, DeepCache, FirstBlock, MagCache, Policy, PromptKV, TaylorSeer, TGate

STEPS = len(TIMES)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for step, (ours, other) in enumerate(zip(found, expected)):
        torch.testing.assert_close(ours, other.to(ours.dtype), rtol=1e-4, atol=1e-4, msg=lambda m, s=step: f"{s}: {m}")


def compare(name: str, policy: Policy, change: Callable[[nn.Module], Callable[[int, float], None] | None]) -> Any:
    case = CASES[name]
    module, net = case.both()
    found, session = with_cache(net, case, policy)
    told = change(module)
    _set_cache_context(module, CacheContext("run"))
    close(found, theirs(module, case) if told is None else theirs(module, case, told))
    return session


@pytest.mark.parametrize("name", ["unet", "dit", "sd3"])
def test_pab(name: str) -> None:
    now = [0.0]

    def change(module: nn.Module) -> Callable[[int, float], None]:
        ranges = {"cross_attention_block_skip_range": 3} if name == "unet" else {}
        apply_pyramid_attention_broadcast(module, PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800),
            cross_attention_timestep_skip_range=(40, 800), current_timestep_callback=lambda: now[0], **ranges))
        return lambda step, t: now.__setitem__(0, t)

    session = compare(name, PAB(cross_times=(40, 800)), change)
    assert session.reused["self"] > 0 and (name != "unet" or session.reused["cross"] > session.reused["self"])


# what diffusers' TaylorSeer computes for cache_interval 3 and disable_cache_before_step 2
THEIR_STEPS = tuple(s for s in range(STEPS) if s < 2 or (s - 3) % 3 == 0)
LAYERS = {"unet": r".*\.transformer_blocks\.\d+\.(attn1|attn2|ff)", "dit": r"transformer_blocks\.\d+\.(attn1|ff)",
          "sd3": r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)"}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylorseer_and_fora(name: str, order: int) -> None:
    def change(module: nn.Module) -> None:
        apply_taylorseer_cache(module, TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, max_order=order, taylor_factors_dtype=torch.float32,
            cache_identifiers=[LAYERS[name]]))

    session = compare(name, TaylorSeer(interval=THEIR_STEPS, order=order) if order else FORA(interval=THEIR_STEPS),
                      change)
    assert (session.forecast if order else session.reused)["mlp"] > 0


@pytest.mark.parametrize("name", ["dit", "flux"])  # diffusers' fails on SD 3, whose last block gives no text
def test_first_block(name: str) -> None:
    session = compare(name, FirstBlock(threshold=0.8), lambda m: apply_first_block_cache(
        m, FirstBlockCacheConfig(threshold=0.8)))
    assert 0 < session.reused["tail"] < STEPS - 1  # decided both ways


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_magcache(name: str) -> None:
    ratios = [1.0, 0.99, 0.97, 1.02, 0.98, 0.94, 0.8, 0.9]
    session = compare(name, MagCache(ratios=ratios, threshold=0.06, most=2), lambda m: apply_mag_cache(
        m, MagCacheConfig(threshold=0.06, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=ratios)))
    assert 0 < session.reused["stack"] < STEPS - 1


@pytest.mark.parametrize("branch", range(6))
def test_deepcache(branch: int) -> None:
    """The hook puts the last computed input of an up layer, without its skip tensor, in place of the new one."""
    step_now, held = [0], {}
    position = 5 - branch  # of the up layer that takes this skip tensor: the UNet has 2 blocks of 3

    def change(module: nn.Module) -> Callable[[int, float], None]:
        resnet = [r for b in module.up_blocks for r in b.resnets][position]
        channels = resnet.conv1.in_channels - [16, 16, 16, 16, 32, 32][branch]

        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *rest = args
            if step_now[0] % 3 == 0:
                held["deep"] = x[:, :channels]
            return (torch.cat([held["deep"], x[:, channels:]], dim=1), *rest)

        resnet.register_forward_pre_hook(hook)
        return lambda step, t: step_now.__setitem__(0, step)

    assert compare("unet", DeepCache(interval=3, branch=branch), change).reused["deep"] == 5


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_tgate(name: str) -> None:
    step_now: list[int] = [0]

    def change(module: nn.Module) -> Callable[[int, float], None]:
        def hook(held: dict[str, Tensor], layer: nn.Module, args: Any, out: Tensor) -> Tensor:
            if step_now[0] < 3:
                held["out"] = out
            return held["out"]

        for path, layer in module.named_modules():
            if path.endswith("attn2"):
                layer.register_forward_hook(partial(hook, {}))
        return lambda step, t: step_now.__setitem__(0, step)

    compare(name, TGate(gate=3), change)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_prompt_kv(name: str) -> None:
    """The hooks give the layers that make the text's keys and values their last computed outputs."""
    step_now: list[int] = [0]

    def change(module: nn.Module) -> Callable[[int, float], None]:
        def hook(held: dict[str, Tensor], tokens: int | None, layer: nn.Module, args: Any, out: Tensor) -> Tensor:
            if step_now[0] % 3 == 0:
                held["out"] = out[:, :tokens]
            return held["out"] if tokens is None else torch.cat([held["out"], out[:, tokens:]], dim=1)

        for path, layer in module.named_modules():
            if path.endswith(("add_k_proj", "add_v_proj")):
                layer.register_forward_hook(partial(hook, {}, None))
            elif path.startswith("single") and path.endswith(("to_k", "to_v")):
                layer.register_forward_hook(partial(hook, {}, 7))
        return lambda step, t: step_now.__setitem__(0, step)

    session = compare(name, PromptKV(interval=3), change)
    assert session.reused["text"] > 0

"""Caches: parts of a network's evaluations that are reused, or forecast, from earlier ones of the same call.

``pipe(prompt, cache=DeepCache(interval=3))``; several policies as a list, where they decide about different segments.
``out.report`` (CacheReport) says what was computed, reused and held. docs/caches.md compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LdmfastError
from .cfg_cache import CFGCache
from .deepcache import DeepCache
from .easycache import EasyCache
from .first_block import FirstBlock
from .fora import FORA
from .guard import Guard, GuardUse
from .magcache import MagCache, residual_ratios
from .pab import PAB
from .parastep import ParaStep
from .policy import Action, Call, Judge, Policy
from .prompt_kv import PromptKV
from .report import CacheReport
from .session import Session
from .taylorseer import TaylorSeer
from .teacache import TeaCache
from .tgate import TGate

POLICIES: dict[str, type[Policy]] = {p.__name__: p for p in (
    CFGCache, DeepCache, EasyCache, FirstBlock, FORA, Guard, MagCache, PAB, ParaStep, PromptKV, TaylorSeer, TeaCache,
    TGate)}

__all__ = ["Action", "CacheReport", "Call", "GuardUse", "Judge", "POLICIES", "Policy", "Session", "check_cache",
           "from_settings", "repeatable", "residual_ratios", *POLICIES]


def check_cache(cache: Any, network: Any, times: Sequence[float]) -> tuple[Policy, ...]:
    """The policies of a call's ``cache`` argument: None, one, or several. Raises LdmfastError for anything else, and
    for policies that do not suit the network or each other."""
    several = isinstance(cache, Sequence) and not isinstance(cache, str)
    found = () if cache is None else tuple(cache) if several else (cache,)
    for policy in found:
        if not isinstance(policy, Policy):
            raise LdmfastError(f"cache={policy!r} is not a cache policy: give one of ldmfast.caches, which are "
                               f"{', '.join(POLICIES)}")
    Session.of(found, network, times)
    return found


def repeatable(cache: Sequence[Policy]) -> bool:
    """Whether ``from_settings`` finds these policies again: they are ours, not derived ones."""
    return all(type(policy) in POLICIES.values() and (not isinstance(policy, Guard) or repeatable([policy.policy]))
               for policy in cache)


def from_settings(rows: Sequence[Mapping[str, Any]] | None) -> tuple[Policy, ...]:
    """Policies from what ``Policy.to_dict`` made of them, as a PNG's settings keep it. Raises LdmfastError for a name
    or a field that is not known."""
    found = []
    for row in rows or ():
        try:
            values = dict(row)
            found.append(POLICIES[values.pop("name")](**values))
        except (KeyError, TypeError, ValueError) as error:
            raise LdmfastError(f"the settings name a cache {row!r}, which this version does not have") from error
    return tuple(found)

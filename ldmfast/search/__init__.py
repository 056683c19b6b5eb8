"""Inference-time search: more evaluations spent on other noises, instead of on more steps, and a verifier that chooses.

    from ldmfast.search import BestOfN, search
    found = search(pipe, "a red circle above a blue square", verifier, BestOfN(8), seed=0)
    found.picture, found.score, found.evaluations
"""

from __future__ import annotations

from .methods import BestOfN, Method, PathSearch, ZeroOrder
from .problem import Candidates, Found, Problem
from .run import search

__all__ = ["BestOfN", "Candidates", "Found", "Method", "PathSearch", "Problem", "ZeroOrder", "search"]

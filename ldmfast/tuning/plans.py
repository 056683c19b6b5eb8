"""Where to place a few evaluations: plans for TaylorSeer(on="output"), judged from one recorded run in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..caches import Call, Judge, Policy
from ..caches.taylorseer import taylor_weights
from ..samplers import StepTable

BEAM = 8
LONGEST = 64


@dataclass(frozen=True, kw_only=True)
class Recorder(Policy):
    """Computes everything and keeps the network's output of every evaluation, by group of pictures."""

    found: list[list[Tensor]] = field(default_factory=list, compare=False)
    dynamic: ClassVar[bool] = True

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self._of(call, ("output",), "the network's output")

    def judge(self, call: Call) -> Judge:
        return _Recording(self)

    @property
    def groups(self) -> list[list[Tensor]]:
        """The outputs of each group's evaluations; a call's arguments are checked with groups that evaluate nothing."""
        return [rows for rows in self.found if rows]


class _Recording(Judge):
    kind = "output"
    policy: Recorder

    def __init__(self, policy: Recorder) -> None:
        super().__init__(policy)
        self.rows: list[Tensor] = []
        policy.found.append(self.rows)

    def needed(self, step: int, indicator: Tensor) -> bool:
        return True

    def computed(self, step: int, indicator: Tensor, value: Tensor) -> None:
        self.rows.append(value.float().cpu())


def influence(table: StepTable) -> np.ndarray:
    """(stages, predictions): the coefficient of each evaluation's prediction in the last x, all others held fixed. The
    adjoint of the table: w M_i, from the last stage to the first, starting with w = (1, 0, ...)."""
    first, names = len(table.columns) - table.num_registers, len(table.predictions)
    kept = [0, *range(first, len(table.columns))]
    w, found = np.eye(1, 1 + table.num_registers)[0], []
    for matrix in table.matrices[::-1]:
        row = w @ matrix
        found.append(row[1:1 + names])
        w = row[kept]
    return np.stack(found[::-1])


def grams(recorder: Recorder, table: StepTable, finished: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """(pictures, stages, stages) products of the guided predictions of a recorded run, over the squared norm of the
    finished latents (n, ...), and the influence (stages,) of each. None where the predictions that the table reads are
    not the branches that the network made (guidance that is not linear), and for more than 64 stages, whose plans would
    take minutes to compare."""
    weights = influence(table)
    total = weights.sum(1)
    if len(total) > LONGEST:
        return None
    found = []
    for rows in recorder.groups:
        if len(rows) != len(total) or len(rows[0]) % weights.shape[1]:
            return None
        guided = []
        for row, w, t in zip(rows, weights, total):
            parts = row[:, :finished.shape[1]].chunk(weights.shape[1])
            guided.append(sum(float(a / t) * p for a, p in zip(w, parts)) if t else parts[-1])
        g = torch.stack([x.flatten(1) for x in guided if isinstance(x, Tensor)]).double()  # (stages, n, numbers)
        found.append(torch.einsum("inx,jnx->nij", g, g))
    size = finished.double().flatten(1).square().sum(1)
    return (torch.cat(found) / size[:, None, None]).numpy(), total


def foreseen(plan: Sequence[int], order: int, products: np.ndarray, weights: np.ndarray) -> float:
    """The mean over pictures of the log of the squared relative error of the finished latents, if the predictions that
    a plan leaves out are forecast along the recorded path: |sum_i c_i (forecast_i - e_i)|^2."""
    d = np.zeros(len(weights))
    newest = -1
    for i in range(len(weights)):
        if newest + 1 < len(plan) and plan[newest + 1] == i:
            newest += 1
            continue
        held = tuple(plan[max(0, newest - order): newest + 1][::-1])
        for j, w in zip(held, _weights(held, i)):
            d[j] += weights[i] * w
        d[i] -= weights[i]
    errors = np.einsum("i,nij,j->n", d, products, d)
    return float(np.log(np.maximum(errors, 1e-30)).mean())


@cache
def _weights(held: tuple[int, ...], step: int) -> tuple[float, ...]:
    return tuple(taylor_weights(held, step))


def placements(products: np.ndarray, weights: np.ndarray, order: int, fewest: int) -> dict[int, tuple[int, ...]]:
    """evaluations -> the plan of that many that is foreseen to err least, found by leaving out one more at a time from
    the best few of the size before."""
    level: list[tuple[int, ...]] = [tuple(range(len(weights)))]
    best = {}
    while len(level[0]) > fewest:
        fewer = {p[:i] + p[i + 1:] for p in level for i in range(1, len(p))}
        level = sorted(fewer, key=lambda p: (foreseen(p, order, products, weights), p))[:BEAM]
        best[len(level[0])] = level[0]
    return best

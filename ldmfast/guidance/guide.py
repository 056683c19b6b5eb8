"""What every guidance answers, and the plan a call makes of them: branches, weights, and what is not linear.

The guided prediction is  e = cond + sum_k weights[stage, k] * branch_k,  and then what the non-linear ones make of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import LdmfastError
from .perturb import Perturb

if TYPE_CHECKING:
    from ..samplers import Schedule, StepTable
    from ..samplers.sample import Denoiser

Array = np.ndarray


@dataclass(frozen=True)
class Source:
    """What makes a branch's x of the prediction of another one, which comes first."""

    of: Branch

    def place(self, network: Any) -> int | None:
        """The block whose self-attention is looked at while ``of`` is evaluated, None for none."""
        return None

    def spy(self, keep: Callable[[Tensor], None]) -> Any:
        """That self-attention, which hands over what it sees."""
        raise NotImplementedError

    def shown(self, x: Tensor, out: Tensor, seen: Tensor | None, at: At) -> Tensor:
        """x as ``of`` was shown it, its prediction, and what the spy kept -> x of this branch, all pictures."""
        raise NotImplementedError

    def time(self, t: float) -> float:
        """The network's time of this branch, for that of ``of``."""
        return t


@dataclass(frozen=True)
class Branch:
    """One prediction of an evaluation. condition: whose conditions it has, "cond", "uncond" or EXTRA and a text.
    perturb: what its self-attention does in some blocks. skip: blocks that it leaves out. network: another one.
    source: it is shown another x."""

    name: str
    condition: str = "cond"
    perturb: Perturb | None = None
    skip: tuple[int, ...] = ()
    network: Any = None
    source: Source | None = None

    @property
    def apart(self) -> Hashable:
        """What branches of one forward have in common."""
        return self.skip, self.network, self.source


COND, UNCOND = Branch("cond"), Branch("uncond", "uncond")
EXTRA = "prompt "  # begins the condition of a branch that has a text of its own


@dataclass(frozen=True)
class Call:
    """What is known before the first evaluation. table: without guidance. scale: the call's guidance_scale.
    prediction: what the network predicts. levels: (stages, 2), alpha and sigma of what the network is shown,
    alpha * picture + sigma * noise. uncond: (stages,) bool, where what stands in the place of classifier-free guidance
    needs the unconditional prediction."""

    table: StepTable
    scale: float = 1.0
    prediction: str = "epsilon"
    levels: Array = field(default_factory=lambda: np.zeros((0, 2)))
    uncond: Array = field(default_factory=lambda: np.zeros(0, dtype=bool))
    schedule: Schedule | None = None

    @classmethod
    def of(cls, schedule: Schedule, table: StepTable, scale: float = 1.0) -> Call:
        times = table.network_times if table.solver_times is None else table.solver_times
        found = levels(schedule, times)
        if table.num_stages:  # a step's first evaluation is at its boundary, whatever time the network is told
            first = np.append(True, table.step_end[:-1])
            found[first] = table.c_in[first, None] * table.noise_levels[:-1]
        return cls(table, scale, schedule.prediction_type, found, schedule=schedule)

    def level(self, t: float) -> tuple[float, float]:
        """alpha and sigma of what the network is shown at a time of its own choice. Raises LdmfastError for none."""
        schedule = self.schedule
        if schedule is None or not 0 < t < schedule.num_train_timesteps:
            raise LdmfastError(f"time={t:g} is not a time of the schedule")
        alpha, sigma = levels(schedule, np.array([t]))[0]
        return float(alpha), float(sigma)

    @property
    def step(self) -> Array:
        """(stages,) the step that each evaluation belongs to."""
        return np.asarray(self.table.step_index)

    def within(self, start: float, stop: float) -> Array:
        """(stages,) bool: the steps between two fractions of all, counted as diffusers' guiders do."""
        steps = self.table.num_steps
        return (int(start * steps) <= self.step) & (self.step < int(stop * steps))


def levels(schedule: Schedule, times: Array) -> Array:
    """(times, 2): alpha and sigma of x = alpha * picture + sigma * noise, as the network is shown it at these times.
    Between trained times the logarithm of sigma / alpha is linear, as the solvers have it."""
    t = np.asarray(times, dtype=np.float64)
    if schedule.flow:
        sigma = t / schedule.num_train_timesteps
        return np.stack([1 - sigma, sigma], axis=1)
    ratio = np.exp(np.interp(t, np.arange(schedule.num_train_timesteps), np.log(schedule.train_sigmas)))
    alpha = 1 / np.sqrt(1 + ratio**2)
    return np.stack([alpha, alpha * ratio], axis=1)


Terms = Mapping[Branch, Array]
Outs = Mapping[Branch, Tensor]


@dataclass(frozen=True)
class At:
    """One evaluation. x: what the network is shown. memory: of this call and guidance, to write to."""

    stage: int
    call: Call
    x: Tensor
    memory: dict[str, Any]

    @property
    def alpha(self) -> float:
        return float(self.call.levels[self.stage, 0])

    @property
    def sigma(self) -> float:
        return float(self.call.levels[self.stage, 1])


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Base of the guidances: frozen settings, shared by any number of calls."""

    base: ClassVar[bool] = False  # stands in the place of classifier-free guidance
    linear: ClassVar[bool] = True
    plain: ClassVar[bool] = True  # numbers and names alone, which settings can keep

    def terms(self, call: Call) -> Terms:
        """What is added to the conditional prediction: for each branch its weights, (stages,)."""
        return {}

    def reads(self, call: Call) -> Mapping[Branch, Array]:
        """(stages,) bool: where combine() needs a branch, beside what terms() weighs."""
        return {}

    def combine(self, e: Tensor | None, outs: Outs, at: At) -> Tensor | None:
        """What is not linear. A base gets None, and gives its own prediction in fp32, or None where it does nothing;
        others get what all before them made of the predictions. outs: those that are read."""
        raise NotImplementedError

    def check(self, network: Any) -> None:
        """Raises LdmfastError for a network that it does not suit."""

    @property
    def remembers(self) -> bool:
        """Whether combine() keeps something in memory for later evaluations."""
        return False

    def to_dict(self) -> dict[str, Any]:
        return {"name": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call does at each evaluation. branches: those that are read anywhere, the conditional one last. weights:
    (stages, branches). reads: (stages, branches) bool, which of them an evaluation needs."""

    guidance: tuple[Guidance, ...]
    call: Call
    branches: tuple[Branch, ...]
    weights: Array
    reads: Array

    @classmethod
    def of(cls, guidance: Sequence[Guidance], call: Call) -> Plan:
        """Raises LdmfastError for two that both stand in the place of classifier-free guidance."""
        bases = [g for g in guidance if g.base]
        if len(bases) > 1:
            raise LdmfastError(f"{type(bases[0]).__name__} and {type(bases[1]).__name__} both stand in the place of "
                               "classifier-free guidance; give one of the two")
        stages = call.table.num_stages
        needs = np.zeros(stages, dtype=bool)
        for base in bases:
            needs |= (np.asarray(base.terms(call).get(UNCOND, needs)) != 0) | base.reads(call).get(UNCOND, needs)
        call = dataclasses.replace(call, uncond=needs)
        weights: dict[Branch, Array] = {COND: np.ones(stages)}
        reads: dict[Branch, Array] = {}
        for one in guidance:
            for branch, more in one.terms(call).items():
                weights[branch] = weights.get(branch, np.zeros(stages)) + more
            for branch, on in one.reads(call).items():
                reads[branch] = reads.get(branch, np.zeros(stages, dtype=bool)) | on
        found = {b: (weights.get(b, np.zeros(stages)) != 0) | reads.get(b, np.zeros(stages, dtype=bool))
                 for b in dict.fromkeys([*weights, *reads])}
        used = [b for b, on in found.items() if b is not COND and on.any()] + [COND]
        return cls(tuple(guidance), call, tuple(used),
                   np.stack([weights.get(b, np.zeros(stages)) for b in used], axis=1),
                   np.stack([found[b] for b in used], axis=1))

    @cached_property
    def curved(self) -> tuple[Guidance, ...]:
        """Those that are not linear, that in the place of classifier-free guidance first."""
        return tuple(sorted((g for g in self.guidance if not g.linear), key=lambda g: not g.base))

    @property
    def rescale(self) -> float:
        return max((getattr(g, "rescale", 0.0) for g in self.guidance), default=0.0)

    @property
    def linear(self) -> bool:
        """Whether all of it goes into the table."""
        return not self.curved and not self.rescale

    @property
    def texts(self) -> tuple[str, ...]:
        """Prompts that branches have beside the call's."""
        return tuple(dict.fromkeys(b.condition[len(EXTRA):] for b in self.branches if b.condition.startswith(EXTRA)))

    @property
    def unsteady(self) -> str:
        """Why not every evaluation is one forward of the plain network, weighed by the table; empty if it is."""
        if any(b.skip for b in self.branches):
            return "skip-layer guidance evaluates another network at some of the steps"
        if any(b.source is not None for b in self.branches):
            return "its guidance evaluates the network again, at what it makes of the first evaluation"
        if any(b.network is not None for b in self.branches):
            return "its guidance evaluates a second network"
        if any(b.perturb is not None for b in self.branches):
            return "its guidance changes the attention inside the network"
        if self.curved:
            return f"{type(self.curved[0]).__name__} is not linear"
        if self.rescale and not (self.reads.all() and (self.weights == self.weights[:1]).all()):
            return "its guidance is rescaled, and does not do the same at every step"
        return ""

    def table(self) -> StepTable:
        """The call's table with the weights folded in; as it is where something is not linear, or nothing is to be
        weighed."""
        table = self.call.table
        if not self.linear or (len(self.branches) == 1 and (self.weights == 1).all()):
            return table
        return table.with_predictions(self.weights, tuple(b.name for b in self.branches))

    def active(self, stage: int) -> tuple[Branch, ...]:
        return tuple(b for b, on in zip(self.branches, self.reads[stage]) if on)

    def outputs(self, outs: Outs, stage: int, x: Tensor, memory: dict[int, dict[str, Any]]) -> Any:
        """The denoiser's answer: one tensor, or one for each branch, None for those that are not read. x: what the
        network was shown. memory: the call's own, empty at its first evaluation."""
        if self.linear:
            return outs[COND] if len(self.branches) == 1 else tuple(outs.get(b) for b in self.branches)
        e: Tensor | None = None
        at = [At(stage, self.call, x, memory.setdefault(i, {})) for i in range(len(self.curved))]
        for i, one in enumerate(self.curved):
            if one.base:
                e = one.combine(None, outs, at[i])
        for branch, weight in zip(self.branches, self.weights[stage].tolist()):
            if weight:
                part = exact(outs[branch]) * weight
                e = part if e is None else e + part
        if e is None:
            e = torch.zeros_like(x, dtype=torch.float32)
        if self.rescale and COND in outs:
            e = rescaled(e, exact(outs[COND]), self.rescale)
        for i, one in enumerate(self.curved):
            if not one.base:
                e = one.combine(e, outs, at[i])
        return e

    def denoise(self, networks: Mapping[str, Callable[[Tensor, float, int], Tensor]]) -> Denoiser:
        """A denoiser for ``samplers.sample`` and ``table()``, for one run. networks: (x, t, stage) -> prediction, by
        the names of the branches. Raises LdmfastError where one is missing."""
        missing = [b.name for b in self.branches if b.name not in networks]
        if missing:
            raise LdmfastError(f"guidance needs a network for {', '.join(missing)}, beside {', '.join(networks)}")
        memory: dict[int, dict[str, Any]] = {}

        def denoise(x: Tensor, t: float, stage: int) -> Any:
            outs = {b: networks[b.name](x, t, stage) for b in self.active(stage)}
            return self.outputs(outs, stage, x, memory)

        return denoise


def exact(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def rescaled(e: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """e with its standard deviation a picture pulled to the conditional prediction's (Lin et al. 2024, "Common
    Diffusion Noise Schedules and Sample Steps are Flawed", eq. 15-16)."""
    dims = list(range(1, e.ndim))
    matched = e * (cond.std(dim=dims, keepdim=True) / e.std(dim=dims, keepdim=True))
    return rescale * matched + (1 - rescale) * e

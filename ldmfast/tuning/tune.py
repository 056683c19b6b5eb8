"""tune: the fastest settings that keep a promise, found on some prompts and tested on others."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import LdmfastError
from ..pipelines.output import replacing
from ..torch_modes import own_modes
from . import measure as measuring
from . import plans, search, space
from .bounds import mean_bound, one_bound, share_bound
from .certify import chunks, inputs
from .chart import Series, chart
from .measure import Drawn
from .metrics import latent_errors, psnr
from .search import CONFIDENCE, LEAST_CALIBRATION, LEAST_HELD_OUT, NEW, Candidate, Measure
from .settings import Promise, Settings, beside, check_call, conditions, identity

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines import Pipeline


# of the budget: when single changes end, combinations, and climbing; the rest is for held-out prompts
SINGLES, SEARCH, CLIMB = 0.2, 0.4, 0.6


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured setting on calibration prompts. value: mean PSNR in dB, or mean error of the last latents."""

    settings: Settings
    speedup: float
    value: float
    pictures: int
    on_front: bool


@dataclasses.dataclass(frozen=True)
class Front:
    """What a search measured: ``pipe.tuned["front"]`` after tune."""

    measure: str
    limit: float
    points: tuple[Point, ...]

    def plot(self) -> Image:
        """Speed against quality of everything that was tried, the Pareto front as a line, the promise as a level."""
        rest, best = ([p for p in self.points if p.on_front == on] for on in (False, True))
        best = sorted(best, key=lambda p: p.speedup)
        label = "mean PSNR, dB" if self.measure == "psnr" else "mean error of the last latents"
        return chart([Series("Pareto front", [p.speedup for p in best], [p.value for p in best]),
                      Series("also tried", [p.speedup for p in rest], [p.value for p in rest], line=False)],
                     "speed-up over the reference", label, (720, 420), self.limit)


@own_modes()
def tune(pipe: Pipeline, prompts: Sequence[str], *, min_psnr: float | None = None,
         max_latent_error: float | None = None, budget_s: float = 300.0, seed: int = 0,
         path: str | os.PathLike[str] | None = None, reference: Settings | None = None, batch: int = 1,
         progress: bool = True, **call: Any) -> Settings:
    """The fastest settings whose pictures keep a promise against the reference's of the same seeds: ``min_psnr`` in dB,
    or ``max_latent_error`` (relative, of the last latents), as a mean over pictures.

    Precision, solver with steps, and caches are tried one by one, then combined, on a third of the prompts (drawn by
    ``seed``, as are the pictures' seeds); the time of each is the median ratio to the reference drawn in the same turn.
    The fastest few are then drawn for the held-out prompts. A setting passes if the one-sided 95% prediction bound
    mean - t s sqrt(1/n + 1/100) of the mean of 100 unseen pictures meets the promise (Student's t: ``mean_bound``);
    they are tested in an order fixed beforehand, safest first, ending at the first that fails, so that trying several
    does not weaken the 95% (fixed sequence testing: Angelopoulos et al. 2021, "Learn then Test"). The bound is for
    prompts like these; share and single-picture bounds that suppose nothing of the distribution come with it, corrected
    for the number of settings tested (``Promise``). If nothing passes, the reference's settings come back, and
    ``notes`` say so.

    reference: default Settings(): exact, with the model's own solver and steps. budget_s: seconds on the wall, passed
    by no more than the trial that runs. batch: pictures a call; time depends on it. call: further arguments, as
    height=. The settings are kept on the pipeline (``settings="auto"``) and saved, with a plot of speed against
    quality, to ``path``, which ends in .json (the plot in .png), by default beside the model; never into the folder of
    a model that ships with ldmfast.
    Raises LdmfastError for fewer than 24 prompts, and for other arguments that make no sense.
    """
    measure = _measure(min_psnr, max_latent_error)
    texts, numbers = inputs(prompts, seed, batch)
    calibration, held_out = split(len(texts), seed)
    if isinstance(budget_s, bool) or not isinstance(budget_s, (int, float)) or not budget_s > 0:
        raise LdmfastError(f"budget_s={budget_s!r} is not a positive number of seconds")
    reference = reference or Settings()
    check_call(pipe, [*reference.call(), *call])
    target, note = _target(pipe, path, reference)
    trials = _Trials(pipe, measure, reference, texts, numbers, call, budget_s, progress)
    chosen, measured = trials.search([calibration[c] for c in chunks(len(calibration), batch)],
                                     [held_out[c] for c in chunks(len(held_out), batch)])
    found = trials.settings(chosen)
    found = dataclasses.replace(found, notes=(*found.notes, *([note] if note else [])))
    on_front = search.front(measured)
    limit = abs(measure.limit)
    front = Front(measure.name, limit, tuple(
        Point(c.settings, c.speed, abs(c.mean), len(c.values), any(c is f for f in on_front)) for c in measured))
    pipe.tuned.update(settings=found, front=front, file=target)
    if target is not None:
        found.save(target)
        plot = target.with_suffix(".png")
        try:
            with replacing(plot) as file:
                front.plot().save(file, format="PNG")
        except OSError as error:
            raise LdmfastError(f"{plot}: cannot be written ({error.strerror or error}); the settings are in {target} "
                               "and on this pipeline") from error
    return found


def split(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the prompts to search with, a third, and of those held out. Raises LdmfastError for too few."""
    needed = LEAST_CALIBRATION + LEAST_HELD_OUT
    if count < needed:
        raise LdmfastError(f"tune needs at least {needed} prompts, {LEAST_CALIBRATION} to search with and "
                           f"{LEAST_HELD_OUT} held out for the bound: {count} given")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    first = max(LEAST_CALIBRATION, count // 3)
    return order[:first], order[first:]


def _measure(min_psnr: float | None, max_latent_error: float | None) -> Measure:
    if (min_psnr is None) == (max_latent_error is None):
        raise LdmfastError("give min_psnr or max_latent_error, one of the two")
    name, value = ("min_psnr", min_psnr) if min_psnr is not None else ("max_latent_error", max_latent_error)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 100:
        raise LdmfastError(f"{name}={value!r} is not a number between 0 and 100")
    return Measure("psnr", value) if name == "min_psnr" else Measure("latent_error", -value)


def _target(pipe: Pipeline, path: str | os.PathLike[str] | None, reference: Settings
            ) -> tuple[Path | None, str | None]:
    """Where to save, checked before the search; and why not, if nowhere. What is found has the reference's guidance."""
    try:
        reference.to_json()
    except LdmfastError as error:
        if path is not None:
            raise
        return None, f"not saved: {error}"
    if path is not None:
        if Path(path).suffix != ".json":
            raise LdmfastError(f"{path}: does not end in .json; settings are JSON, and their plot takes the same name "
                               "with .png")
        if not Path(path).parent.is_dir():
            raise LdmfastError(f"{path}: its folder does not exist; create it or give another path")
        return Path(path), None
    found = beside(pipe)
    if found is not None and os.access(found.parent, os.W_OK):
        return found, None
    return None, (f"not saved: the folder of {pipe.source} is not written to; kept on this pipeline (give path= to "
                  "keep them)")


class _Trials:
    """Draws for the search, within the budget."""

    def __init__(self, pipe: Pipeline, measure: Measure, reference: Settings, texts: list[str], numbers: list[int],
                 call: dict[str, Any], budget_s: float, progress: bool) -> None:
        from ..progress import Bar

        self.pipe, self.measure, self.reference, self.call = pipe, measure, reference, call
        self.texts, self.numbers, self.budget = texts, numbers, budget_s
        self.start = time.monotonic()
        self.warm: set[str] = set()
        self.notes: list[str] = []
        self.references: dict[tuple[int, ...], Drawn] = {}
        self.bar = Bar(total=round(budget_s), disable=not progress, desc="tune", unit="s",
                       bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.0f} of {total} s{postfix}")

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def search(self, calibration: list[list[int]], held_out: list[list[int]]
               ) -> tuple[Candidate | None, list[Candidate]]:
        with self.bar:
            names, self.notes = space.precisions(self.pipe, self.reference)
            recorder = plans.Recorder()
            settings = dataclasses.replace(self.reference, cache=(*self.reference.cache, recorder))
            products = None
            if not self.reference.cache:
                first = self._draw(settings, calibration[0])
                products = plans.grams(recorder, first.table, first.trajectory.latents[-1])
            else:
                first = self._draw(self.reference, calibration[0])
            base = self.reference

            def singles(precisions: list[Candidate]) -> list[Candidate]:
                nonlocal base
                base = space.fastest(self.measure, self.reference, precisions)
                return space.singles(self.pipe, base, first.made, products)

            count = sum(map(len, held_out))
            tries = search.Tries(
                [Candidate(dataclasses.replace(self.reference, precision=name)) for name in names], singles,
                lambda measured: space.combinations(self.measure, base, measured),
                lambda measured: space.start(self.measure, base, measured, count),
                partial(space.faster, self.pipe),
                lambda settings: space.nearby(0 if products is None else len(products[1]), settings))
            brief, turn = (partial(self.turn, share * self.budget) for share in (SINGLES, SEARCH))
            draws = search.Draws(brief, turn, partial(self.trial, calibration), self.test)
            return search.run(self.measure, draws, tries, calibration, held_out)

    def turn(self, until: float, candidates: list[Candidate], part: Sequence[int], ordered: bool = False) -> bool:
        """Draws what can be begun before ``until``. A candidate that raises is dropped; where they are ``ordered``, as
        for a fixed sequence of tests, those after it, too."""
        if self.elapsed() > until or not candidates:
            return False
        reference = self._draw(self.reference, part)
        if not ordered:  # held-out pictures are not seen again
            self.references[tuple(part)] = reference
        for c in list(candidates):
            if self.elapsed() > until:
                return False
            try:
                self._add(c, reference, self._draw(c.settings, part))
            except LdmfastError as error:  # a policy that does not suit the network, or numbers that become NaN
                at = next(i for i, other in enumerate(candidates) if other is c)
                how = "failed on held-out prompts, where testing ended" if ordered else "was dropped"
                self.notes.append(f"{c.settings} {how}: {error}")
                if ordered:
                    del candidates[at:]
                    break
                del candidates[at]
        return True

    def test(self, finalists: list[Candidate], part: Sequence[int]) -> bool:
        """A turn on held-out prompts: a finalist that raises has failed, and testing ends there."""
        return self.turn(self.budget, finalists, part, ordered=True)

    def trial(self, calibration: list[list[int]], c: Candidate) -> bool:
        """Draws for all calibration prompts, against the reference's pictures and times that are there."""
        try:
            for part in calibration:
                if self.elapsed() > CLIMB * self.budget:
                    return False
                if tuple(part) not in self.references:
                    self.references[tuple(part)] = self._draw(self.reference, part)
                self._add(c, self.references[tuple(part)], self._draw(c.settings, part))
        except LdmfastError as error:
            self.notes.append(f"{c.settings} was dropped: {error}")
            c.values.clear()
        return True

    def _add(self, c: Candidate, reference: Drawn, drawn: Drawn) -> None:
        n, c.made = len(drawn.images), drawn.made
        if self.measure.name == "psnr":
            c.values += psnr(drawn.images, reference.images).tolist()
        else:
            c.values += (-latent_errors(drawn.trajectory, reference.trajectory)[1][-1]).tolist()
        c.ratios.append(reference.seconds / drawn.seconds)
        guards = () if drawn.report is None else drawn.report.guards
        if guards:
            c.used += [g.used for g in guards] * (n if len(guards) == 1 else 1)

    def _draw(self, settings: Settings, part: Sequence[int]) -> Drawn:
        texts, numbers = [self.texts[i] for i in part], [self.numbers[i] for i in part]
        if settings.precision not in self.warm:  # the first call in a precision is slower
            short = Settings(precision=settings.precision, steps=2)
            measuring.draw(self.pipe, short, texts[:1], numbers[:1], self.call)
            self.warm.add(settings.precision)
        found = measuring.draw(self.pipe, settings, texts, numbers, self.call)
        self.bar.n = min(self.elapsed(), self.budget)
        self.bar.refresh()
        return found

    def settings(self, chosen: Candidate | None) -> Settings:
        """The chosen ones with their promise, or the reference's."""
        known: dict[str, Any] = {"model": identity(self.pipe), "version": __version__, "device": self.pipe.device.type}
        if chosen is None:
            nothing = (f"no faster setting kept the promise ({self.measure.name} {abs(self.measure.limit):g}) on the "
                       f"held-out prompts within {self.budget:g} s: these are the reference's settings")
            return dataclasses.replace(self.reference, notes=(nothing, *self.notes), **known)
        sign: Callable[[float], float] = (lambda v: v) if self.measure.name == "psnr" else (lambda v: -v)
        values = chosen.values
        n, good = len(values), sum(v >= self.measure.limit for v in values)
        each = 1 - (1 - CONFIDENCE) / chosen.finalists  # Bonferroni: it was chosen on these very pictures
        single = one_bound(values, each)
        promise = Promise(
            measure=self.measure.name, limit=sign(self.measure.limit), bound=sign(mean_bound(values, CONFIDENCE, NEW)),
            mean=sign(chosen.mean), worst=sign(min(values)), held_out=n, new=NEW, confidence=CONFIDENCE,
            share=good / n, share_bound=share_bound(good, n, each), one=sign(single) if abs(single) < 1e9 else None,
            finalists=chosen.finalists, speedup=chosen.speed, made=conditions(chosen.made))
        return dataclasses.replace(chosen.settings, promise=promise, notes=tuple(self.notes), **known)

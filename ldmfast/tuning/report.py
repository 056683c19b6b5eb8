"""The certificate: what certify found, printed, and saved as JSON, HTML and PNG."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import LdmfastError
from ..pipelines.output import replacing
from .bounds import mean_bound
from .chart import Series, chart, contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 12  # pairs on the contact sheet, the worst first


@dataclass(frozen=True)
class Arm:
    """One way to draw. settings: in words. seconds, parts ("text", "denoise", "decode"): a picture, the median of the
    turns; with one thread on a CPU processor time, else wall time. step_seconds: of each step, a picture. evaluations:
    of the network, a picture; rows: with each branch of guidance counted. memory: bytes at the peak of a call over
    those before it, None where that cannot be seen. attributes: share that the judge found right, by name; None
    without a judge."""

    settings: str
    seconds: float
    parts: dict[str, float]
    step_seconds: list[float]
    evaluations: float
    rows: float
    memory: int | None
    attributes: dict[str, float] | None


@dataclass(frozen=True)
class Report:
    """What faster settings change and save, against reference pictures of the same seeds.

    psnr (dB), ssim: of each picture. levels: share of noise s / (a + s) at the end of the fast call's steps;
    latent_errors: (levels, pictures), relative to the reference's latents at the same level; the last row is that of
    the finished latents. speedup: the median over turns of the ratio of times; each turn draws both in a row.
    promise: of tuned settings. notes: what else is to be known. pictures: "reference" and "fast", (n, 3, H, W) in
    [0, 1]; they are in no JSON.
    """

    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    reference: Arm
    fast: Arm
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    levels: tuple[float, ...]
    latent_errors: tuple[tuple[float, ...], ...]
    speedup: float
    speedups: tuple[float, ...]
    promise: str | None = None
    notes: tuple[str, ...] = ()
    pictures: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def latent_error(self) -> tuple[float, ...]:
        """Of each picture's finished latents."""
        return self.latent_errors[-1]

    def summary(self) -> dict[str, dict[str, float | None]]:
        """measure -> mean, worst and the one-sided 95% bound of the mean (lower, for errors upper; None for one
        picture)."""
        found = {}
        for name, values, sign in (("psnr", self.psnr, 1), ("ssim", self.ssim, 1), ("latent_error",
                                                                                   self.latent_error, -1)):
            bound = None if len(values) < 2 else sign * mean_bound([sign * v for v in values])
            found[name] = {"mean": statistics.fmean(values), "worst": sign * min(sign * v for v in values),
                           "bound": bound}
        return found

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_json(self) -> str:
        row = asdict(self.without_pictures())
        row.pop("pictures")
        return json.dumps({"ldmfast_certificate": 1, "summary": self.summary(), **row}, indent=1)

    def without_pictures(self) -> Report:
        return replace(self, pictures={})

    def sheet(self) -> Image:
        """The contact sheet: pairs with a difference map, the worst first, and the error over the steps."""
        if not self.pictures:
            raise LdmfastError("this report has no pictures any more: the sheet is of a report fresh from certify")
        worst = sorted(range(len(self.psnr)), key=lambda i: self.psnr[i])[:SHOWN]
        titles = [f"{self.psnr[i]:.1f} dB, SSIM {self.ssim[i]:.3f}, seed {self.seeds[i]}: {self.prompts[i]}"
                  for i in worst]
        return contact_sheet(self.pictures["reference"][worst], self.pictures["fast"][worst], titles,
                             self.error_chart())

    def error_chart(self) -> Image:
        means = [statistics.fmean(row) for row in self.latent_errors]
        return chart([Series("mean", self._steps, means), Series("worst", self._steps, [max(r) for r in
                                                                                       self.latent_errors])],
                     "step of the fast call", "relative error of the latents")

    @property
    def _steps(self) -> list[int]:
        """The fast call's step of each level, counted from 1."""
        count = len(self.fast.step_seconds)
        return list(range(count - len(self.levels) + 1, count + 1))

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes certificate.json, certificate.html (of itself, nothing beside it is needed) and certificate.png, each
        under a temporary name first. Raises LdmfastError where that is not possible."""
        target, buffer = Path(folder), io.BytesIO()
        self.sheet().save(buffer, format="PNG")
        png = buffer.getvalue()
        files = {"certificate.png": png, "certificate.html": _page(self, png).encode(),
                 "certificate.json": self.to_json().encode()}
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                with replacing(target / name) as file:
                    file.write(data)
        except OSError as error:
            raise LdmfastError(f"{target}: cannot be written ({error.strerror or error}); give another "
                               "folder") from error
        return [target / name for name in files]


def _rows(report: Report) -> list[tuple[str, ...]]:
    """name, reference, fast, ratio."""
    a, b = report.reference, report.fast
    rows: list[tuple[str, ...]] = [
        ("seconds a picture", f"{a.seconds:.3f}", f"{b.seconds:.3f}", f"{report.speedup:.2f}x")]
    rows += [(f"  {part}", f"{a.parts[part]:.3f}", f"{b.parts[part]:.3f}", _ratio(a.parts[part], b.parts[part]))
             for part in a.parts]
    rows += [("  a step, the median", f"{statistics.median(a.step_seconds):.4f}",
              f"{statistics.median(b.step_seconds):.4f}", ""),
             ("network evaluations", f"{a.evaluations:.1f}", f"{b.evaluations:.1f}",
              _ratio(a.evaluations, b.evaluations)),
             ("  with guidance branches", f"{a.rows:.1f}", f"{b.rows:.1f}", _ratio(a.rows, b.rows)),
             ("peak memory, MiB", *(("not seen" if arm.memory is None else f"{arm.memory / 2**20:.1f}")
                                    for arm in (a, b)), "")]
    if a.attributes is not None and b.attributes is not None:
        means = [statistics.fmean(arm.attributes.values()) for arm in (a, b) if arm.attributes]
        rows.append(("attributes right", *(f"{m:.1%}" for m in means), f"{(means[1] - means[0]) * 100:+.1f} points"))
        rows += [(f"  {name}", f"{a.attributes[name]:.1%}", f"{b.attributes[name]:.1%}", "") for name in a.attributes]
    return rows


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}x" if b > 0 else ""


def _quality(report: Report) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, words, form in (("psnr", "PSNR, dB", "{:.2f}"), ("ssim", "SSIM", "{:.4f}"),
                              ("latent_error", "error of the last latents", "{:.4f}")):
        row = report.summary()[name]
        values = (row["mean"], row["worst"], row["bound"])
        found.append((words, *("-" if v is None else form.format(v) for v in values)))
    return found


def _lines(report: Report) -> list[str]:
    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        return [f"{row[0]:28s}" + "".join(f"{cell:>16s}" for cell in row[1:]) for row in (head, *rows)]

    n = len(report.prompts)
    lines = [f"{report.model}: {n} picture{'s' * (n > 1)} of {report.width}x{report.height}, the same seeds",
             f"reference: {report.reference.settings}", f"fast:      {report.fast.settings}", "",
             *table(("", "mean", "worst", "95% bound, mean"), _quality(report)), "",
             *table(("", "reference", "fast", ""), _rows(report)), "",
             "error of the latents after each step (mean over pictures):",
             "  " + "  ".join(f"{step}: {statistics.fmean(row):.3f}"
                              for step, row in zip(report._steps, report.latent_errors))]
    if report.promise is not None:
        lines += ["", f"promised: {report.promise}"]
    return [*lines, *report.notes]


def _page(report: Report, png: bytes) -> str:
    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        return f"<table><tr>{cells}</tr>{body}</table>"

    each = [(str(i), prompt, str(seed), _number(p, 2), f"{s:.4f}", f"{e:.4f}") for i, (prompt, seed, p, s, e) in
            enumerate(zip(report.prompts, report.seeds, report.psnr, report.ssim, report.latent_error))]
    steps = [(str(step), f"{level:.3f}", f"{statistics.fmean(row):.4f}", f"{max(row):.4f}")
             for step, level, row in zip(report._steps, report.levels, report.latent_errors)]
    notes = "".join(f"<p>{html.escape(text)}</p>" for text in
                    ([] if report.promise is None else [f"Promised: {report.promise}"]) + list(report.notes))
    style = ("body{font:14px sans-serif;margin:2em;max-width:900px}table{border-collapse:collapse;margin:1em 0}"
             "td,th{border-bottom:1px solid #ddd;padding:3px 10px;text-align:right}"
             "td:first-child,th:first-child{text-align:left;white-space:pre}img{max-width:100%}")
    picture = base64.b64encode(png).decode()
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(report.model)}</title>'
            f"<style>{style}</style><h1>What faster settings change: {html.escape(report.model)}</h1>"
            f"<p>Reference: {html.escape(report.reference.settings)}<br>Fast: {html.escape(report.fast.settings)}</p>"
            + table(("", "mean", "worst", "95% bound of the mean"), _quality(report))
            + table(("", "reference", "fast", ""), _rows(report)) + notes
            + f'<img alt="contact sheet" src="data:image/png;base64,{picture}">'
            + "<h2>Error of the latents</h2>" + table(("step", "share of noise", "mean", "worst"), steps)
            + "<h2>Pictures</h2>" + table(("", "prompt", "seed", "PSNR", "SSIM", "error of the last latents"), each)
            + "</html>")


def _number(value: float, digits: int) -> str:
    return "equal" if math.isinf(value) else f"{value:.{digits}f}"

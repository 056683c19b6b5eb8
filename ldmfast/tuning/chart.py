"""Small charts and contact sheets with PIL alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

INK, FAINT, COLOURS = "#222222", "#dddddd", ("#1f5fa8", "#c8501e", "#2c8a4b", "#8a4b9c")
MARGIN = (64, 24, 16, 44)  # left, top, right, bottom


@dataclass(frozen=True)
class Series:
    """x and y of one line, or of points alone. labels: written beside the points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    line: bool = True
    labels: Sequence[str] = ()


def chart(series: Sequence[Series], x_label: str, y_label: str, size: tuple[int, int] = (640, 320),
          level: float | None = None) -> Image:
    """A picture of the series on linear axes. level: a horizontal line that means a promise."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = MARGIN
    box = (left, top, size[0] - right, size[1] - bottom)
    points = [(x, y) for s in series for x, y in zip(s.x, s.y) if math.isfinite(y)]
    levels = [] if level is None else [level]
    xs, ys = _ticks([x for x, _ in points] or [0, 1]), _ticks([y for _, y in points] + levels or [0, 1])

    def place(x: float, y: float) -> tuple[float, float]:
        return (box[0] + (x - xs[0]) / (xs[-1] - xs[0]) * (box[2] - box[0]),
                box[3] - (y - ys[0]) / (ys[-1] - ys[0]) * (box[3] - box[1]))

    for x in xs:
        pen.line([place(x, ys[0]), place(x, ys[-1])], fill=FAINT)
        pen.text((place(x, 0)[0], box[3] + 4), f"{x:g}", fill=INK, anchor="ma")
    for y in ys:
        pen.line([place(xs[0], y), place(xs[-1], y)], fill=FAINT)
        pen.text((box[0] - 4, place(0, y)[1]), f"{y:g}", fill=INK, anchor="rm")
    pen.text(((box[0] + box[2]) / 2, size[1] - 6), x_label, fill=INK, anchor="md")
    pen.text((6, 4), y_label, fill=INK)
    if level is not None:
        pen.line([place(xs[0], level), place(xs[-1], level)], fill="#b00020", width=2)
    end = float(box[2])  # names stand above the box, from the right
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        _draw(pen, one, colour, place)
        pen.text((end, 4), one.name, fill=colour, anchor="ra")
        end -= pen.textlength(one.name) + 16
    return image


def _draw(pen: ImageDraw, one: Series, colour: str, place: object) -> None:
    assert callable(place)
    spots = [place(x, y) for x, y in zip(one.x, one.y) if math.isfinite(y)]
    if one.line and len(spots) > 1:
        pen.line(spots, fill=colour, width=2)
    for x, y in spots:
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    for (x, y), label in zip(spots, one.labels):
        pen.text((x + 6, y - 2), label, fill=colour, anchor="lb")


def _ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers that cover the values."""
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    first = math.floor(low / step)
    return [round((first + i) * step, 12) for i in range(math.ceil(high / step) - first + 1)]


def contact_sheet(reference: Tensor, fast: Tensor, titles: Sequence[str], below: Image | None = None,
                  side: int = 128, columns: int = 2) -> Image:
    """Pairs of pictures (n, 3, H, W) in [0, 1] side by side with a map of their difference (the mean over channels,
    black for none, white for the largest of the sheet, which the head line names), a title over each pair."""
    from PIL import Image, ImageDraw

    line, gap = 16, 8
    apart = (reference - fast).abs().mean(1)
    top = float(apart.max()) or 1.0
    height = max(1, round(side * reference.shape[2] / reference.shape[3]))
    rows = -(-len(titles) // columns)
    width = columns * (3 * side + gap) - gap
    wide = max(width, below.width if below is not None else 0)
    sheet = Image.new("RGB", (wide, line + rows * (height + line + gap) + (below.height if below is not None else 0)),
                      "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((2, 2), f"reference, fast, difference (white: {top:.3f} of the range)", fill=INK)
    for i, title in enumerate(titles):
        x, y = i % columns * (3 * side + gap), line + i // columns * (height + line + gap)
        pen.text((x + 2, y + 2), _fit(pen, title, 3 * side - 4), fill=INK)
        for j, picture in enumerate((reference[i], fast[i], (apart[i] / top).expand(3, -1, -1))):
            array = np.rint(picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
            sheet.paste(Image.fromarray(array).resize((side, height)), (x + j * side, y + line))
    if below is not None:
        sheet.paste(below, (0, sheet.height - below.height))
    return sheet


def _fit(pen: ImageDraw, text: str, width: int) -> str:
    while pen.textlength(text) > width:
        text = text[:-4].rstrip() + "..."
    return text

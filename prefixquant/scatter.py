"""Scatter plots as SVG, for pages that need no other file and no plotting library."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 55, 15, 15, 60  # margins
_FEWEST_TICKS = 3


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot.

    Attributes:
        x: a number, or a text, which is a category.
        y: a number.
        label: the text next to the point, below it in odd groups.
        group: points of a group have one colour, the CSS class `groupN`, N being `group` modulo 4.
        title: the text that a reader gets who points at it.
    """

    x: float | str
    y: float
    label: str
    group: int
    title: str


def draw_scatter(points: Sequence[Point], *, x_label: str, y_label: str) -> str:
    """Return an SVG picture as wide as its place on the page. Either all x are numbers, or all are texts."""
    categories = sorted({point.x for point in points if isinstance(point.x, str)})
    places = [float(categories.index(point.x)) if isinstance(point.x, str) else float(point.x) for point in points]
    x_ticks = {float(place): name for place, name in enumerate(categories)} or _choose_ticks(places)
    y_ticks = _choose_ticks([point.y for point in points])
    left, right = min([*x_ticks, *places]), max([*x_ticks, *places])
    low, high = min([*y_ticks, *(point.y for point in points)]), max([*y_ticks, *(point.y for point in points)])
    bottom = _HEIGHT - _BOTTOM

    def place_x(x: float) -> float:
        inner = _WIDTH - _LEFT - _RIGHT - 40
        return _LEFT + 20 + inner * ((x - left) / (right - left) if right > left else 0.5)

    def place_y(y: float) -> float:
        return bottom - 10 - (bottom - _TOP - 20) * ((y - low) / (high - low) if high > low else 0.5)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(f"{y_label} by {x_label}")}">']
    for y, name in y_ticks.items():
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place_y(y):.1f}" y2="{place_y(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place_y(y) + 4:.1f}" text-anchor="end">{name}</text>')
    for number, (x, name) in enumerate(x_ticks.items()):
        # Names of categories are long, so neighbours are in two lines, and the outer ones begin or end at their place.
        lower = 14 * (number % 2) if categories else 0
        anchor = {0: "start", len(categories) - 1: "end"}.get(number, "middle") if len(categories) > 1 else "middle"
        parts.append(f'<line x1="{place_x(x):.1f}" x2="{place_x(x):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{place_x(x):.1f}" y="{bottom + 15 + lower}" text-anchor="{anchor}">{html.escape(name)}</text>'
        )
    for point, x in zip(points, places, strict=True):
        across, down = place_x(x), place_y(point.y)
        beside = down + (12 if point.group % 2 else -4)  # so that two texts of one run keep apart
        parts.append(
            f'<g class="group{point.group % 4}"><title>{html.escape(f"{point.title}: {point.y:g}")}</title>'
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4"/></g>'
            f'<text x="{across + 6:.1f}" y="{beside:.1f}">{html.escape(point.label)}</text>'
        )
    middle = (_TOP + bottom) / 2
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text></svg>'
    )
    return "".join(parts)


def _choose_ticks(values: Sequence[float]) -> dict[float, str]:
    """Return round numbers between the smallest and the largest value, each with its text; equal values are one."""
    low, high = min(values), max(values)
    if not high > low:
        return {low: f"{low:g}"}
    power = 10.0 ** math.floor(math.log10(high - low))
    steps = [factor * power for factor in (5, 2, 1, 0.5, 0.2)]  # the last one has at least four ticks
    choices = [
        [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)] for step in steps
    ]
    ticks = next(choice for choice in choices if len(choice) >= _FEWEST_TICKS)
    return {tick: f"{tick:.6g}" for tick in ticks}

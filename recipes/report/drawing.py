"""How everything is drawn: figures without global state, as PNG and as SVG that follows the page; one color per method.

SVG of the page has its width, its font, and its light and dark colors as variables of its style sheet.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from lora_null.utils.errors import UserError

try:
    import matplotlib
except ValueError as error:  # a matplotlibrc in another encoding, which matplotlib has named
    raise UserError(f"matplotlib: {error}; mend or remove its matplotlibrc") from None
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

# One color a method, in every picture and table, and the same on the ground of the dark page, with a contrast of 4.5 to it. From
# Okabe-Ito and Tol's muted palette, told apart by color-blind eyes; mixing with white brings dark colors together.
METHOD_COLORS = {
    "base": ("#6b7280", "#8d929d"), "full": ("#333333", "#e3e5e9"), "lora": ("#d55e00", "#e8772a"),
    "lora-fa": ("#882255", "#b87f91"), "pissa": ("#cc79a7", "#dd7bbe"), "milora": ("#e69f00", "#e69f00"),
    "corda": ("#009e73", "#14be7d"), "roselora": ("#999933", "#939946"), "lora-null-v1": ("#56b4e9", "#8ad4ff"),
    "lora-null-v2": ("#0072b2", "#3f94e4"), "osf": ("#54acb1", "#489fae"), "mica": ("#332288", "#b68dee"),
    "eva": ("#ae7d2e", "#b28438"), "lora-ga": ("#13602b", "#96b489"), "nb-lora": ("#0b3c6f", "#8e90c7"),
    "sc-lora": ("#ed5eae", "#fc53af"), "kl-anchor": ("#782a12", "#e0957a"), "replay": ("#7fbf3f", "#7fbf3f"),
    "clora": ("#8073ac", "#dfc0f7"), "oft": ("#b9af00", "#bdad03"), "oplora": ("#b2182b", "#e66573"),
    "keeplora": ("#00766d", "#23a690"),
}  # fmt: skip
COLORS = {name: light for name, (light, _) in METHOD_COLORS.items()}
ON_DARK = {name: dark for name, (_, dark) in METHOD_COLORS.items()}
OTHER_COLORS = ("#aa4499", "#6699cc", "#661100", "#88a000", "#7b6fd0", "#c0504d")
INK, FAINT, GOOD, DARK_CARD = "#1f2937", "#c3c9d2", "#15803d", "#1b2537"
SHADE = "#bddbc9"  # of the better corner, where it is darkest

GLYPHS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "<": "◀", ">": "▶"}
MARKERS = tuple(GLYPHS)
NEAR = 20  # a distance in CIELAB below which two colors are easily taken for each other
LOG_FROM = 30  # a span of values beyond this factor is drawn on a logarithmic axis
READABLE = 4.5  # the least contrast of text to its ground (WCAG 2, AA)
# Around all that draws: a user's matplotlibrc is for figures of the user's own, and may ask for a LaTeX that is not here.
default_look = matplotlib.rc_context({k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"})


@dataclass(frozen=True)
class Picture:
    """Drawings of one thing for the page.

    Attributes:
        drawings: (name of the choice, SVG) of which one is seen at a time, or panels beside each other, each with its name.
        caption: how it is read.
        title: what is drawn, where the page does not say it.
        panels: whether the drawings are panels.
        legend: (color, marker or line, text) of what the drawings do not name themselves.
    """

    drawings: list[tuple[str, Markup]]
    caption: str = ""
    panels: bool = False
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    title: str = ""


def colors_of(methods: Iterable[str]) -> dict[str, str]:
    """Return a color a method: fixed for those we know, from a cycle for others."""
    names, cycle = dict.fromkeys(methods), itertools.cycle(OTHER_COLORS)
    return {name: COLORS.get(name) or next(cycle) for name in names}


def markers_of(colors: Sequence[str]) -> list[str]:
    """Return a marker per color: each in turn, past those of colors that are near in light or in dark."""
    found: list[str] = []
    for i, color in enumerate(colors):
        start = i % len(MARKERS)
        turn = MARKERS[start:] + MARKERS[:start]
        taken = {marker for marker, other in zip(found, colors) if distance(color, other) < NEAR}
        found.append(next((marker for marker in turn if marker not in taken), turn[0]))
    return found


def distance(color: str, other: str) -> float:
    """Return how far two colors are apart in CIELAB (1976), in light or in dark, where they are nearer."""
    return min(math.dist(_lab(a), _lab(b)) for a, b in ((color, other), (on_dark(color), on_dark(other))))


@functools.cache
def _lab(color: str) -> tuple[float, ...]:
    """Return L*, a* and b* of a color of sRGB, whose white is D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum(np.dot(to_xyz, _linear(color)) / (0.9505, 1, 1.089), 0.0))
    return float(116 * y - 16), float(500 * (x - y)), float(200 * (y - z))


def is_wide(values: Sequence[float]) -> bool:
    """Return whether positive values span so much that a logarithmic axis shows them better."""
    return min(values) > 0 and max(values) > LOG_FROM * min(values)


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, size: int = 10, **shared: Any
) -> tuple[Figure, Any]:
    """Return an empty figure, in inches, and its axes: one, or an array."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, **shared)
    for axes in np.atleast_1d(panels).ravel():
        dress(axes, size)
    return figure, panels


def dress(axes: Axes, size: int) -> None:
    """Give axes the look of all: no frame, gray lines, letters of a size in points."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors=INK, labelsize=size)
    axes.xaxis.label.set(color=INK, fontsize=size)
    axes.yaxis.label.set(color=INK, fontsize=size)


def sentence(text: str, *, narrow: bool = False) -> Figure:
    """Return a figure that says why there is none."""
    figure, axes = new_figure(4.3 if narrow else 8.0, 1.2)
    axes.set_axis_off()
    axes.text(0.5, 0.5, textwrap.fill(text, 40), ha="center", va="center", color=INK, fontsize=12)
    return figure


def lay_out(figure: Figure) -> None:
    """Give all axes their places for good; what is measured or drawn from now on does not do so again."""
    FigureCanvasAgg(figure)  # which measures text
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine("none")


def png(figure: Figure) -> bytes:
    """Return the figure as PNG; equal figures give equal bytes."""
    lay_out(figure)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # savefig would draw twice
    return buffer.getvalue()


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as SVG for the page: no background, sized by the page, colors as variables of its style sheet."""
    lay_out(figure)
    figure.set_facecolor("none")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head = '<svg viewBox="{}" role="img" aria-label="{}">'
    text = re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", lambda found: head.format(found[1], escape(alt)), text)
    text = _own_ids(text)
    text = re.sub(r"(font: [^;\"]*?|font-family: )'DejaVu Sans'[^;\"]*", r"\1var(--sans)", text)
    return Markup(re.sub(r"#[0-9a-f]{6}\b", lambda match: variable(match[0]), text))


def _own_ids(text: str) -> str:
    """Names that no other drawing of the page has; groups, which nothing refers to, need none."""
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>d{own}-", text)


def escape_math(text: str) -> str:
    """`$` would start a formula."""
    return text.replace("$", r"\$")


def wrapped(text: str, width: int = 24) -> str:
    """Break a long name into lines, at a hyphen or space where there is one; `$` would start a formula."""
    lines = [""]
    text = escape_math(text).replace(" = ", "\u00a0=\u00a0")
    for word in re.findall(r"[^- ]*[- ]?", text):
        for piece in [word[i : i + width] for i in range(0, len(word), width)]:
            lines[-1:] = [lines[-1] + piece] if len(lines[-1] + piece) <= width else [lines[-1], piece]
    return "\n".join(line.strip() for line in lines)


def axis_title(text: str, width: int = 36) -> str:
    """An axis' title in lines that fit beside it, with an arrow to its further end; `$` would start a formula."""
    return f"{wrapped(text, width)}  →"


def variable(color: str) -> str:
    """The variable of the page's style sheet that stands for a color."""
    named = {INK: "ink", FAINT: "faint", "#ffffff": "card", "#9ca3af": "soft"}
    return f"var(--{named.get(color, 'c' + color[1:])})"


def palette(page_colors: Sequence[str]) -> list[tuple[str, str, str]]:
    """(variable, on white, on a dark ground) of every color of a method, and as text, darker on white."""
    colors = dict.fromkeys([*page_colors, *COLORS.values(), *OTHER_COLORS, GOOD])
    shown = {readable(color): on_dark(color) for color in colors} | {color: on_dark(color) for color in colors}
    return [(f"--c{color[1:]}", color, dark) for color, dark in shown.items()]


@functools.cache
def readable(color: str) -> str:
    """Return a color of text on white and on the shade of the better corner: mixed with as much black as it needs."""
    mixed = (to_hex([(1 - share) * c for c in to_rgb(color)]) for share in np.arange(0, 1, 0.05))
    return next(shade for shade in mixed if contrast(shade, SHADE) >= READABLE)


@functools.cache
def on_dark(color: str) -> str:
    """Return what `color` is on the dark page: its own there, or mixed with as much white as stands out."""
    own = dict(METHOD_COLORS.values()).get(color)
    mixed = (to_hex([(1 - share) * c + share for c in to_rgb(color)]) for share in np.arange(0, 1, 0.05))
    return own or next((shade for shade in mixed if contrast(shade, DARK_CARD) >= READABLE), "#ffffff")


def contrast(color: str, ground: str) -> float:
    """Return the contrast of WCAG 2, from 1 to 21."""
    darker, lighter = sorted(float(np.dot(_linear(c), (0.2126, 0.7152, 0.0722))) for c in (color, ground))
    return (lighter + 0.05) / (darker + 0.05)


def _linear(color: str) -> list[float]:
    """Return red, green and blue as amounts of light."""
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]

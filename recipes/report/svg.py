"""Drawings of matplotlib as SVG that follows the page: its width, its font, its light and dark colors."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

# One color a method, in every picture and table. From Okabe-Ito and Tol's muted palette, told apart by color-blind eyes.
COLORS = {
    "base": "#6b7280", "full": "#333333", "lora": "#d55e00", "lora-fa": "#882255", "pissa": "#cc79a7",
    "milora": "#e69f00", "corda": "#009e73", "roselora": "#999933", "lora-null-v1": "#56b4e9",
    "lora-null-v2": "#0072b2", "osf": "#44aa99", "mica": "#332288", "eva": "#a6761d", "lora-ga": "#117733",
    "nb-lora": "#0b3c6f", "sc-lora": "#e377c2", "kl-anchor": "#8c2d04", "replay": "#7fbf3f", "clora": "#8073ac",
    "oft": "#c9a000", "oplora": "#b2182b",
}  # fmt: skip
OTHER_COLORS = ("#aa4499", "#6699cc", "#661100", "#88a000", "#7b6fd0", "#c0504d")
INK, FAINT, GOOD, DARK_CARD = "#1f2937", "#c3c9d2", "#15803d", "#1b2537"


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as SVG for the page: no background, sized by the page, colors as variables of its style sheet."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{escape(alt)}">', text
    )
    text = _own_ids(text)
    text = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--sans)", text)
    return Markup(re.sub(r"#[0-9a-f]{6}\b", lambda match: variable(match[0]), text))


def _own_ids(text: str) -> str:
    """Names that no other drawing of the page has; groups, which nothing refers to, need none."""
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>d{own}-", text)


def variable(color: str) -> str:
    """The variable of the page's style sheet that stands for a color."""
    return {INK: "var(--ink)", FAINT: "var(--faint)", "#ffffff": "var(--card)", "#9ca3af": "var(--soft)"}.get(
        color, f"var(--c{color[1:]})"
    )


def palette(page_colors: Sequence[str]) -> list[tuple[str, str, str]]:
    """(variable, on white, on a dark ground) of every color of a method: lightened until it stands out there."""
    return [
        (f"--c{color[1:]}", color, _lighter(color)) for color in dict.fromkeys([*page_colors, *COLORS.values(), GOOD])
    ]


def _lighter(color: str) -> str:
    """`color`, mixed with as much white as gives a contrast of 4.5 to the ground of the dark page."""
    for share in np.arange(0, 1, 0.05):
        mixed = to_hex([(1 - share) * channel + share for channel in to_rgb(color)])
        if (_luminance(mixed) + 0.05) / (_luminance(DARK_CARD) + 0.05) >= 4.5:
            return mixed
    return "#ffffff"


def _luminance(color: str) -> float:
    """The relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

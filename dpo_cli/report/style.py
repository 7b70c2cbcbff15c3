"""What all pages share: templates that load nothing, and colors for log(pi / pi_ref)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

SHADES = 8
_SCALE_QUANTILE = 0.98


def page_environment() -> Environment:
    """The templates of all pages, which escape every text of a model or a data file, and their style sheets."""
    found = Environment(
        loader=PackageLoader("dpo_cli.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.globals |= {"signed": signed, "num_shades": SHADES}
    return found


def scale_of(ratios: Sequence[float]) -> float:
    """The ratio that has the full color, nats: 1, 2 or 5 times a power of ten, which few tokens go beyond."""
    reach = float(np.quantile(np.abs(ratios), _SCALE_QUANTILE)) if len(ratios) else 1.0
    reach = max(reach, 0.01)
    power = 10.0 ** math.floor(math.log10(reach))
    return next((step * power for step in (1, 2, 5) if step * power >= reach), 10 * power)


def shade_of(ratio: float, scale: float) -> str:
    """The class of a token's color: ``p1`` to ``p8`` where the policy raises it, ``n1`` to ``n8`` where it lowers."""
    step = min(SHADES, round(SHADES * abs(ratio) / scale))
    return f"{'p' if ratio > 0 else 'n'}{step}" if step else ""


def shades_of(scale: float) -> list[str]:
    """The classes of a legend, from the least to the largest ratio."""
    return [shade_of(step * scale / SHADES, scale) for step in range(-SHADES, SHADES + 1)]


def signed(number: float, digits: int = 2) -> str:
    """A number with its sign."""
    return f"{number:+.{digits}f}".replace("-", "\N{MINUS SIGN}")

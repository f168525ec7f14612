"""How numbers are written for a reader: in reports, on the command line and in the app."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DASH = "–"


def fixed(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A number with a fixed number of decimals, never "-0.000"; a dash for None."""
    if value is None:
        return DASH
    rounded = round(float(value), digits) + 0.0
    return f"{rounded:+.{digits}f}" if sign and rounded else f"{rounded:.{digits}f}"


def p_text(value: Any) -> str:
    """A p-value to three significant digits: 0.988, 1.83e-21; a dash for None."""
    return DASH if value is None else f"{float(value):.3g}"


def interval_text(pair: Any) -> str:
    """A 95 % interval: [0.310, 0.402]; empty for None."""
    return f"[{fixed(pair[0])}, {fixed(pair[1])}]" if pair else ""


def plain(value: Any) -> str:
    """A setting or recorded value on one line, without floating-point noise."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return str(value)

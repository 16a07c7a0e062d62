"""Curves as SVG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.figures import Curve

_WIDTH_INCHES = 7.0
_HEIGHT_INCHES = 3.6


def draw(curve: Curve, target: Path) -> None:
    """Draw a curve; the same figures make the same file."""
    with mpl.rc_context({"svg.hashsalt": curve.name, "svg.fonttype": "none"}):
        figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        axes = figure.subplots()
        for name, points in curve.series.items():
            marker = None if curve.linear else "o"
            axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, markersize=3, label=name)
        if curve.linear:
            axes.set_ylim(bottom=0)
        else:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_xlabel(curve.x)
        axes.set_ylabel(curve.y)
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(target, metadata={"Date": None})

"""Figures of a report and of `mmimpute.plots`: small panels, so that a page can arrange them for its width.

Each function takes what `disclosure.view` lets through and returns a matplotlib figure. Colours are Okabe and Ito's, which colour-blind
readers tell apart, and no figure relies on colour alone. `svg` exchanges them for CSS variables, so that a page's dark mode holds inside.
"""

import io
import re
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, MUTED, GRID, BLUE, ORANGE = "#1b1e23", "#5f6670", "#dcdfe4", "#0072b2", "#d55e00"
CSS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", BLUE: "var(--blue)", ORANGE: "var(--orange)"}
GROUPS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", INK, MUTED)
MARKERS = "os^Dv<>P"
MOST_FEATURES = 30  # in one plot: the first ones by skill

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmimpute",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
    "hatch.color": ORANGE,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def training(history: list[dict], name: str, title: str, unit: str) -> Figure:
    """One figure of training by epoch, on the records learnt from (where known) and on those not; the epoch that was kept is marked."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(title, width=4.4)
        values = []
        for key, label, colour, line in ((name, "learnt from", BLUE, "-"), (f"tune_{name}", "not learnt from", ORANGE, "--")):
            points = [(epoch["epoch"], epoch[key]) for epoch in history if epoch.get(key) is not None]
            if points:
                marker = "o" if len(points) < 12 else None
                axes.plot(*zip(*points, strict=True), line, color=colour, label=label, linewidth=1.6, marker=marker, ms=3)
                values += [point[1] for point in points]
        if name != "loss":
            _leave_out_the_first_epochs(axes, values)
        kept = [epoch["epoch"] for epoch in history if epoch.get("kept")]
        if kept:
            axes.axvline(kept[-1], color=MUTED, linewidth=1, linestyle=":", label=f"kept: epoch {kept[-1]}")
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if values:
            axes.legend(loc="best")
        return figure


def _leave_out_the_first_epochs(axes: Axes, values: list[float]) -> None:
    """With many epochs, end the axis where the curve is of interest: the first values are far below all others."""
    if len(values) >= 20:
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 20], ordered[-1]
        axes.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)


def skill(scores: list[dict], title: str) -> Figure:
    """Horizontal bars of skill by name, best first; the column mean is the line at 0."""
    with matplotlib.rc_context(STYLE):
        scores = sorted((s for s in scores if s["skill"] is not None), key=lambda s: s["skill"], reverse=True)[:MOST_FEATURES]
        figure, axes = _panel(title, width=4.6, height=0.62 + 0.24 * max(len(scores), 2))
        values = [score["skill"] for score in scores]
        bars = axes.barh(range(len(scores)), values, color=BLUE, height=0.68)
        for bar, value in zip(bars, values, strict=True):
            if value < 0:
                bar.set(facecolor="none", edgecolor=ORANGE, hatch="////")
        axes.bar_label(bars, [f"{round(value, 2) + 0.0:.2f}" for value in values], padding=3, color=INK, fontsize=8)
        axes.axvline(0.0, color=INK, linewidth=1)
        axes.set_yticks(range(len(scores)), [shortened(score["name"]) for score in scores])
        axes.invert_yaxis()
        low, high = min([0.0, *values]), max([0.1, *values])
        axes.set_xlim(low - (0.2 * (high - low) if low < 0 else 0.0), high + 0.12 * (high - low))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("skill (0: the column mean; 1: perfect)")
        return figure


def drift(features: list[dict], moderate: float, large: float) -> Figure:
    """Horizontal bars of the population stability index, worst first; a tick is what chance alone exceeds hardly ever."""
    with matplotlib.rc_context(STYLE):
        shown = features[:MOST_FEATURES]
        figure, axes = _panel("Shift of features", width=4.6, height=0.75 + 0.24 * max(len(shown), 2))
        beyond = [f["psi"] > max(large, f["noise"]) for f in shown]
        bars = axes.barh(range(len(shown)), [f["psi"] for f in shown], color=BLUE, height=0.68)
        for bar, alert in zip(bars, beyond, strict=True):
            if alert:
                bar.set(facecolor="none", edgecolor=ORANGE, hatch="////")
        axes.bar_label(bars, [f"{f['psi']:.2f}" for f in shown], padding=3, color=INK, fontsize=8)
        axes.plot([f["noise"] for f in shown], range(len(shown)), "|", color=INK, ms=9)
        for value, line in ((moderate, ":"), (large, "--")):
            axes.axvline(value, color=INK, linewidth=1, linestyle=line)
        axes.set_yticks(range(len(shown)), [shortened(f["name"]) for f in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max([1.2 * large, *(f["psi"] for f in shown), *(f["noise"] for f in shown)]))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"population stability index (moderate: {moderate:g}; large: {large:g})")
        return figure


def missing(modalities: list[dict]) -> Figure:
    """Dots of the share of records that lack each modality: open in training, filled in the new shards."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel("Missing modalities", width=4.6, height=0.75 + 0.28 * max(len(modalities), 2))
        rows = range(len(modalities))
        before, now = [m["training"] for m in modalities], [m["missing"] for m in modalities]
        axes.hlines(rows, before, now, color=MUTED, linewidth=1)
        axes.plot(before, rows, "o", color=BLUE, markerfacecolor="none", ms=6, label="training", clip_on=False)
        axes.plot(now, rows, "o", color=ORANGE, ms=6, label="new shards", clip_on=False)
        axes.set_yticks(rows, [shortened(m["name"]) for m in modalities])
        axes.set(xlim=(0, max([0.1, *before, *now]) * 1.05), ylim=(len(modalities) - 0.5, -0.5), xlabel="share of records")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="best", fontsize=8)
        return figure


def labels(heads: list[dict]) -> Figure:
    """AUROC of each target by the number of labelled people that a head has learnt from."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel("What fewer labels give", width=4.4)
        for head, colour in zip(heads, cycle(GROUPS), strict=False):
            axes.plot(*zip(*head["curve"], strict=True), "-o", color=colour, label=shortened(head["name"]), linewidth=1.6, ms=4)
        axes.set(xlabel="people with a label", ylabel="AUROC, out of fold", xscale="log")
        axes.legend(loc="best", fontsize=8)
        return figure


def patterns(shown: list[dict], names: list[str]) -> Figure:
    """Which modalities come together: a row of dots per pattern, filled where the modality is present; and people by pattern."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 0.34 * len(names), 1.1 + 0.26 * max(len(shown), 2)))
        held, people = figure.subplots(1, 2, sharey=True, width_ratios=(0.34 * len(names), 1.4))
        rows, columns = np.indices((len(shown), len(names)))
        on = np.array([[name in pattern["present"] for name in names] for pattern in shown], bool).reshape(rows.shape)
        held.plot(columns[~on], rows[~on], "o", color=MUTED, markerfacecolor="none", ms=6, label="missing", clip_on=False)
        held.plot(columns[on], rows[on], "o", color=BLUE, ms=7, label="present", clip_on=False)
        held.set_xticks(range(len(names)), [shortened(n, 14) for n in names], rotation=60, ha="right", rotation_mode="anchor")
        held.set(yticks=[], ylim=(len(shown) - 0.4, -0.6), xlim=(-0.5, len(names) - 0.5))
        bars = people.barh(range(len(shown)), [pattern["rows"] for pattern in shown], color=BLUE, height=0.62)
        people.bar_label(bars, [f"{pattern['rows']:,}" for pattern in shown], padding=3, color=INK, fontsize=8)
        people.set(xlabel="people", xlim=(0, 1.3 * max([1, *(pattern["rows"] for pattern in shown)])))
        people.xaxis.set_major_locator(MaxNLocator(3))
        for axes in (held, people):
            axes.grid(False)
            axes.tick_params(length=0)
            axes.spines[["left", "bottom"]].set_visible(axes is people)
        held.set_title("Which modalities come together (filled: present)")
        return figure


def latent(groups: dict[str, tuple[np.ndarray, np.ndarray]], shares: tuple[float, float], title: str) -> Figure:
    """Dots on the first two principal components: what a group is called -> places, M x 2, and how many people each stands for, M."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(title, width=4.6, height=4.0)
        for (name, (xy, people)), colour, marker in zip(groups.items(), GROUPS, MARKERS, strict=False):
            axes.scatter(*xy.T, s=2 * people, color=colour, marker=marker, alpha=0.7, linewidth=0, label=shortened(name, 34))
        axes.set(xlabel=f"first component of z0 ({shares[0]:.0%})", ylabel=f"second component of z0 ({shares[1]:.0%})")
        axes.set_aspect("equal", adjustable="datalim")
        if len(groups) > 1:
            axes.legend(loc="best", fontsize=8, handlelength=1.0)
        return figure


def dots(names: list[str], series: dict[str, list], title: str, label: str) -> Figure:
    """One line per name, one dot per series: a value, or (value, low, high) with its interval, or None."""
    with matplotlib.rc_context(STYLE):
        names = names[:MOST_FEATURES]
        figure, axes = _panel(title, width=4.8, height=0.95 + 0.26 * max(len(names), 2))
        for at, ((name, values), colour, marker) in enumerate(zip(series.items(), (BLUE, ORANGE, MUTED), "os|", strict=False)):
            shift = 0.2 * (at - 0.5) if len(series) > 1 and at < 2 else 0.0
            shown = [(y + shift, v if isinstance(v, tuple) else (v, v, v)) for y, v in enumerate(values[: len(names)]) if v is not None]
            rows, (x, low, high) = [y for y, _ in shown], zip(*(v for _, v in shown), strict=True) if shown else ((), (), ())
            axes.hlines(rows, low, high, color=colour, linewidth=1.2)
            axes.plot(x, rows, marker, color=colour, ms=9 if marker == "|" else 5, label=name, clip_on=False)
        axes.set_yticks(range(len(names)), [shortened(n, 30) for n in names])
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=label)
        axes.tick_params(axis="y", length=0)
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=len(series), fontsize=8, handlelength=1.2)
        return figure


def coverage(calibration: dict, title: str) -> Figure:
    """How often the truth lies inside an interval, against how often it should."""
    return _panels(title, [(_coverage, calibration)])


def reliability(bins: list[dict], title: str) -> Figure:
    """How often a binary value is 1, against the predicted probability; the larger the dot, the more people."""
    return _panels(title, [(_reliability, bins)])


def pit(counts: list[int], title: str) -> Figure:
    """Where the truth falls in its predictive distribution; flat when the distribution is right."""
    return _panels(title, [(_pit, counts)])


def calibration(modality: dict) -> Figure:
    """Those of the three that there are of a modality, side by side."""
    drawn = {"calibration": _coverage, "pit": _pit, "reliability": _reliability}
    return _panels(modality["name"], [(draw, modality[name]) for name, draw in drawn.items() if modality[name]])


def _panels(title: str, drawn: list[tuple[Callable, Any]]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(drawn), 2.7))
        row = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (draw, shown) in zip(row, drawn, strict=True):
            draw(axes, shown)
        row[0].set_title(title)
        return figure


def _coverage(axes: Axes, calibration: dict) -> None:
    _diagonal(axes)
    axes.plot(calibration["nominal"], calibration["observed"], "o-", color=BLUE, linewidth=1.6, ms=4, clip_on=False)
    axes.set(xlabel="nominal coverage", ylabel="observed coverage")


def _reliability(axes: Axes, bins: list[dict]) -> None:
    _diagonal(axes)
    x, y, n = ([bin[key] for bin in bins] for key in ("predicted", "observed", "n"))
    axes.plot(x, y, "-", color=BLUE, linewidth=1.2, clip_on=False)
    axes.scatter(x, y, s=[16 + 70 * (count / max(n)) ** 0.5 for count in n], color=BLUE, clip_on=False, zorder=3)
    axes.set(xlabel="predicted probability", ylabel="observed share")


def _pit(axes: Axes, counts: list[int]) -> None:
    height = [n * len(counts) / sum(counts) for n in counts]
    edges = [i / len(counts) for i in range(len(counts))]
    axes.bar(edges, height, width=1 / len(counts), align="edge", color=BLUE, edgecolor=GRID, linewidth=0.5)
    axes.axhline(1.0, color=ORANGE, linewidth=1.4, linestyle="--")
    axes.set(xlabel="predictive quantile of the truth", ylabel="density", xlim=(0, 1), ylim=(0, max(2.0, 1.1 * max(height))))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def distribution(shown: dict) -> Figure:
    """Observed values filled, imputed values as an outline, both as densities."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(shortened(shown["name"], 34))
        edges = shown["edges"]
        for name, style in (
            ("observed", {"fill": True, "color": BLUE, "alpha": 0.45, "linewidth": 0}),
            ("imputed", {"fill": False, "color": ORANGE, "linewidth": 1.8}),
        ):
            counts = shown[name]
            if whole := sum(counts):
                widths = [b - a for a, b in pairwise(edges)]
                density = [n / whole / width if width > 0 else 0.0 for n, width in zip(counts, widths, strict=True)]
                axes.stairs(density, edges, label=name, **style)
        axes.set_yticks([])
        axes.set_ylim(0, 1.3 * axes.dataLim.ymax)  # room for the legend
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.legend(loc="upper right", fontsize=8, handlelength=1.2)
        return figure


def svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an inline SVG element that scales with the page and reads out as `label`."""
    from markupsafe import escape

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s*<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    referenced = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in referenced else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", text)
    for colour, variable in CSS.items():
        text = re.sub(colour, variable, text, flags=re.IGNORECASE)
    box = re.search(r'viewBox="[^"]+"', text)[0]
    return f'<svg {box} role="img" aria-label="{escape(label)}">' + text[text.index(">") + 1 :]


def shortened(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _panel(title: str, width: float = 3.3, height: float = 2.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _diagonal(axes: Axes) -> None:
    """Both axes from 0 to 1 and the line on which a calibrated model lies."""
    axes.plot([0, 1], [0, 1], color=ORANGE, linewidth=1.4, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", adjustable="box")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(PercentFormatter(1.0))

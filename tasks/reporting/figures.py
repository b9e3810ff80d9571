"""Figures of the report: numbers in, a matplotlib ``Figure`` out, and that as SVG for a page or PNG for an artifact.

Only the object-oriented interface is used, so no figure outlives its drawing. Colours are a small fixed set; in an SVG
each becomes a CSS variable with that colour as its fallback, so that a page can redefine them for a dark screen.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, FancyBboxPatch, Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from tasks.records import CLASS_NAMES, NORMAL, PNEUMONIA, Facts

INK, MUTED, LINE, PAPER = "#1b2733", "#566573", "#d5dde3", "#fefefe"
FOR, AGAINST = "#c8432d", "#2b68ad"
"""Pneumonia and normal, close to the red and blue of the LIME maps, so that a colour means one thing on the page."""

VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper", FOR: "for", AGAINST: "against"}
WIDTH_IN = 4.7
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "x_ray_classification",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
mpl.rcdefaults()  # whatever a matplotlibrc says, a report looks the same


def draw_training(epochs: Sequence[int], losses: NDArray[np.float64], aucs: NDArray[np.float64]) -> Figure:
    """Loss and validation AUC by epoch, one above the other: a thin line for each network, a thick one for their mean.

    Args:
        epochs: Numbers of the epochs, from 1.
        losses: Mean training loss of each network after each epoch, ``(n_networks, n_epochs)``.
        aucs: AUC on validation, 0 to 1, of the same shape.
    """
    several = len(losses) > 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.9), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for axes, values, name in ((above, losses, "training loss"), (below, aucs, "validation AUC")):
            axes.grid(axis="y")
            if several:
                axes.plot(epochs, values.T, color=AGAINST, linewidth=0.9, alpha=0.65, marker=".", markersize=3)
            axes.plot(epochs, values.mean(axis=0), color=INK, linewidth=1.8, marker="o", markersize=3)
            axes.set_ylabel(name)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.margins(y=0.12)
        if several:
            thick, thin = Line2D([], [], color=INK, linewidth=1.8), Line2D([], [], color=AGAINST, linewidth=0.9)
            names = [f"mean of the {len(losses)} networks", "each network"]
            above.legend([thick, thin], names, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        low, high = below.get_ylim()
        below.set_ylim(low, min(high, 1 + 0.06 * (1 - low)))
        below.set_xlabel("epoch")
        below.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return figure


def roc_points(labels: NDArray[np.float64], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners of the ROC curve, float64 ``(k, 2)``: 1 - specificity and sensitivity from (0, 0) to (1, 1).

    Args:
        labels: 0.0 or 1.0, ``(n,)``, both present.
        probabilities: ``(n,)``; equal ones form one step, a slanted one when both classes share it.

    Raises:
        ValueError: If a class is missing.
    """
    order = np.argsort(-probabilities, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probabilities[order])), len(order) - 1)
    hits, alarms = np.cumsum(labels[order] == 1)[ends], np.cumsum(labels[order] != 1)[ends]
    if not hits[-1] or not alarms[-1]:
        raise ValueError("a ROC curve needs both classes")
    return np.vstack([(0.0, 0.0), np.column_stack([alarms / alarms[-1], hits / hits[-1]])])


def draw_roc(
    points: NDArray[np.float64],
    operating: tuple[float, float],
    threshold: float,
    second: tuple[float, float] | None = None,
) -> Figure:
    """The ROC curve with the point that the threshold chooses, and as a ring that of a second threshold, if any.

    Args:
        points: As from ``roc_points``.
        operating: Sensitivity and specificity at the threshold, 0 to 1.
        threshold: The probability from which on an image counts as pneumonia.
        second: Sensitivity and specificity at the second threshold, 0 to 1.
    """
    sensitivity, specificity = operating
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.grid()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.fill_between(points[:, 0], points[:, 1], color=AGAINST, alpha=0.07, linewidth=0)
        axes.plot(points[:, 0], points[:, 1], color=AGAINST, linewidth=2, solid_joinstyle="round")
        if second is not None:
            (ring,) = axes.plot(1 - second[1], second[0], "o", color=FOR, markersize=8.5, clip_on=False, zorder=5)
            ring.set(markerfacecolor="none", markeredgewidth=1.8)
        axes.plot(1 - specificity, sensitivity, "o", color=FOR, markersize=7.5, clip_on=False, zorder=5)
        # Below the diagonal no curve of a network that learned anything passes, wherever its point lies.
        lines = (f"specificity {specificity:.3f}", f"sensitivity {sensitivity:.3f}", f"at threshold {threshold:#.3g}:")
        for line, text in enumerate(lines):
            # A text of its own each: a page's font is not the one that lines were measured in.
            axes.text(0.97, 0.05 + 0.055 * line, text, ha="right", va="bottom")
        axes.annotate("chance", (0.5, 0.5), xytext=(6, -6), textcoords="offset points", va="top", color=MUTED)
        axes.set(xlabel="1 − specificity (false alarms among normal)", ylabel="sensitivity (pneumonia found)")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
        return figure


def draw_probabilities(labels: NDArray[np.float64], probabilities: NDArray[np.float64], threshold: float) -> Figure:
    """How the answers spread: a histogram for each class, normal below, pneumonia above, with the threshold.

    Args:
        labels: 0.0 or 1.0, ``(n,)``.
        probabilities: 0 to 1, ``(n,)``.
        threshold: The probability from which on an image counts as pneumonia.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for axes, label, colour in ((panels[0], PNEUMONIA, FOR), (panels[1], NORMAL, AGAINST)):
            values = probabilities[labels == label]
            axes.grid(axis="y")
            axes.hist(values, bins=np.linspace(0, 1, 26).tolist(), color=colour, edgecolor=PAPER, linewidth=0.8)
            axes.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
            axes.set_ylabel("images")
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_title(
                f"truly {CLASS_NAMES[label]}: {len(values):,} images", loc="left", fontsize=9.5, color=colour
            )
        panels[0].set_ylim(0, 1.2 * max(panels[0].get_ylim()[1], 1))
        panels[0].annotate(
            f"threshold {threshold:#.3g}",
            (threshold, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5 if threshold < 0.6 else -5, -2),
            textcoords="offset points",
            ha="left" if threshold < 0.6 else "right",
            va="top",
        )
        panels[1].set(xlabel="probability of pneumonia", xlim=(-0.01, 1.01))
        return figure


def draw_reliability(bins: Sequence[Facts]) -> Figure:
    """How often an answer is right that claims so: share of pneumonia against probability, and how many images say so.

    Args:
        bins: ``{"from", "to", "n"}``, and for bins that hold images ``{"mean_probability", "share"}``, all 0 to 1, as
            from ``tasks.measures.measure_calibration``.
    """
    filled = [part for part in bins if part["n"]]
    centres, counts = [(part["from"] + part["to"]) / 2 for part in bins], [part["n"] for part in bins]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.grid()
        above.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        shares = [part["share"] for part in filled]
        above.plot([part["mean_probability"] for part in filled], shares, color=AGAINST, linewidth=1.6, marker="o")
        above.text(0.02, 0.98, "dashed: perfect calibration", va="top", color=MUTED)
        above.set(ylabel="share with pneumonia", ylim=(-0.02, 1.04), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
        below.bar(centres, counts, width=0.08, color=AGAINST, alpha=0.55)
        for centre, count in zip(centres, counts, strict=True):
            below.text(centre, count, f"{count:,}", ha="center", va="bottom", fontsize=8)
        below.set(
            xlabel="probability of pneumonia", ylabel="images", xlim=(-0.01, 1.01), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1]
        )
        below.set_ylim(0, 1.3 * max(*counts, 1))
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        return figure


def draw_rates(rows: Sequence[Facts]) -> Figure:
    """Share of images that show a device: a bar per split and class; groups of which nothing is known say so.

    Args:
        rows: ``{"name", "class", "rate"}``, the rate 0 to 1 or ``None`` where nothing is known;
            rows of one name follow each other.
    """
    with mpl.rc_context(STYLE):
        names = list(dict.fromkeys(row["name"] for row in rows))
        figure = Figure(figsize=(WIDTH_IN, 0.62 * len(names) + 0.75), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="x")
        for row in rows:
            normal = row["class"] == CLASS_NAMES[NORMAL]
            place = names.index(row["name"]) + (-0.19 if normal else 0.19)
            if row["rate"] is None:
                axes.text(1, place, "not known", va="center", color=MUTED, fontsize=8.5)
                continue
            axes.barh(place, 100 * row["rate"], height=0.34, color=AGAINST if normal else FOR)
            axes.text(100 * row["rate"] + 1, place, f"{100 * row['rate']:.1f} %", va="center", fontsize=8.5)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="images with a device, %")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        _name_classes(axes)
        return figure


def draw_shifts(rows: Sequence[Facts], heads: Sequence[str], bound: float) -> Figure:
    """How far each change moves each network: a dot with its interval per network, a row per change.

    Args:
        rows: ``{"name", "values"}``, a value ``{"value", "low", "high"}`` or ``None`` for each network.
        heads: Names of the networks.
        bound: Largest accepted shift; dashed on both sides of 0.
    """
    colours = (INK, FOR)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 0.42 * len(rows) + 1.1), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="x")
        axes.axvline(0, color=MUTED, linewidth=1)
        for edge in (-bound, bound):
            axes.axvline(edge, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        for place, row in enumerate(rows):
            for turn, value in enumerate(row["values"]):
                if value is None or value["value"] is None:
                    continue
                y = place + 0.2 * (turn - (len(heads) - 1) / 2)
                axes.plot([value["low"], value["high"]], [y, y], color=colours[turn], linewidth=1.8)
                axes.plot(value["value"], y, "o", color=colours[turn], markersize=5)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="shift, share of the distance between the classes")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        marks = [Line2D([], [], color=colours[i], marker="o", linewidth=1.8) for i in range(len(heads))]
        axes.legend(marks, list(heads), loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        return figure


def draw_lungs(rows: Sequence[Facts], heads: Sequence[str]) -> Figure:
    """What each network knows of an X-ray that is shown whole or in part: a bar of AUC from chance, with its interval.

    Args:
        rows: ``{"name", "shown", "values"}``: a few words; ``whole``, ``only``, ``removed`` or ``other``, for the small
            sign beside them; and AUC ``{"value", "low", "high"}`` for each network.
        heads: Names of the networks.
    """
    colours = (AGAINST, MUTED)
    thick = 0.72 / len(heads)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 * WIDTH_IN, 0.85 * len(rows) + 0.9), layout="constrained")
        names, axes = figure.subplots(1, 2, sharey=True, width_ratios=(0.36, 0.64))
        names.set_axis_off()
        lowest = min([0.45, *(one["low"] - 0.02 for row in rows for one in row["values"] if one["value"] is not None)])
        axes.axvline(0.5, color=INK, linewidth=1.4)
        for place, row in enumerate(rows):
            _draw_sign(names, place, row["shown"])
            names.text(0.3, place, row["name"], va="center", fontsize=10.5)
            for turn, one in enumerate(row["values"]):
                y = place + thick * (turn - (len(heads) - 1) / 2)
                if one["value"] is None:
                    axes.text(0.51, y, "not measured", va="center", color=MUTED, fontsize=8.5)
                    continue
                axes.barh(y, one["value"] - 0.5, left=0.5, height=0.9 * thick, color=colours[turn])
                axes.plot([one["low"], one["high"]], [y, y], color=INK, linewidth=1.3)
                right = max(one["high"], 0.5) + 0.008
                axes.text(right, y, f"{one['value']:.2f}", va="center", fontsize=10 if turn == 0 else 9)
        axes.set(xlim=(lowest, 1.05), ylim=(len(rows) - 0.5, -0.55), yticks=[])
        axes.set_xticks([0.5, 0.75, 1.0], ["0.5\nguessing", "0.75", "1.0\nalways right"])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("AUC: how well pneumonia is told from normal")
        marks = [Patch(color=colour, label=head) for colour, head in zip(colours, heads, strict=False)]
        axes.legend(handles=marks, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, handlelength=0.9)
        return figure


def _draw_sign(axes: Axes, row: int, shown: str) -> None:
    """A chest of a few strokes for a row of ``draw_lungs``: what is white is covered."""
    sign = axes.inset_axes((0.02, row - 0.4, 0.24, 0.8), transform=axes.transData)
    sign.set(xlim=(0, 10), ylim=(0, 10), xticks=[], yticks=[])
    for side in sign.spines.values():
        side.set_visible(False)
    body, lung = (LINE if shown != "only" else PAPER), (AGAINST if shown in ("whole", "only") else PAPER)
    sign.add_patch(
        FancyBboxPatch((1, 0.8), 8, 8.4, boxstyle="round,pad=0,rounding_size=1.6", fc=body, ec=MUTED, lw=0.8)
    )
    dx, dy, size = (0.7, 0.8, 0.8) if shown == "other" else (0, 0, 1)
    dashed = (0, (2, 1.5)) if shown == "other" else "-"
    for x in (3.2, 6.8):
        place, width, height = (x + dx, 5.1 + dy), 2.6 * size, 6.2 * size
        sign.add_patch(Ellipse(place, width, height, fc=lung, ec=MUTED, lw=0.8, ls=dashed))


def _name_classes(axes: Axes) -> None:
    """A legend of the two class colours above the axes."""
    patches = [Patch(color=AGAINST, label="normal"), Patch(color=FOR, label="pneumonia")]
    axes.legend(
        handles=patches, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0, handlelength=0.9
    )


def as_svg(figure: Figure, key: str, title: str, description: str) -> str:
    """A figure as an ``<svg>`` to be put into HTML, named for people who cannot see it.

    Args:
        figure: What is drawn.
        key: Letters and dashes, one for each figure of a page: it keeps their ids apart.
        title: A few words.
        description: What the figure shows, in a sentence.
    """
    stream = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    # Inside HTML an <svg> needs no declaration, no namespaces and no metadata.
    svg = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    start = svg.index("<svg")
    head_end = svg.index(">", start)
    box = re.search(r'viewBox="([^"]+)"', svg[start:head_end])
    body = svg[head_end + 1 :].replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', body))
    body = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{key}-", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable}, {colour})")
    return (
        f'<svg role="img" viewBox="{box[1] if box else "0 0 100 100"}" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(description)}</desc>'
        f"{body.strip()}"
    )


def as_png(figure: Figure, dpi: int = 100) -> bytes:
    """A figure as PNG on white."""
    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="png", dpi=dpi, facecolor="white")
    return stream.getvalue()


def data_uri(data: bytes, kind: str) -> str:
    """Bytes of an image as an address that needs no file; ``kind`` is ``png`` or ``jpeg``."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read_picture(path: Path) -> str | None:
    """A PNG as a JPEG data URI, about a third of its size; ``None`` when the file is missing."""
    if not path.exists():
        return None
    stream = io.BytesIO()
    Image.open(io.BytesIO(path.read_bytes())).convert("RGB").save(stream, "JPEG", quality=88, subsampling=0)
    return data_uri(stream.getvalue(), "jpeg")

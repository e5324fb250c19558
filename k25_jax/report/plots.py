"""Figures of a report, drawn by matplotlib without a display. Each public function returns the bytes of a PNG.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; right and wrong answers also carry a sign.
"""

import functools
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RIGHT, WRONG = "#0072B2", "#D55E00"
INK, MUTED, GRID = "#1f2933", "#66717d", "#e3e7eb"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in an answer starts no formula
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "legend.frameon": False,
}

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> (steps, values)


def loss_curves(
    curves: Curves, title: str = "Loss", y_label: str = "loss (nats per token)", x_label: str = "step"
) -> bytes:
    """Several curves over steps: the raw values faint, a running mean bold. Values that are not finite are crosses."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(7.5, 4.2)
        draw_curves(axes, curves, title, y_label, x_label)
        return png_bytes(figure)


def bar_chart(
    groups: Mapping[str, Mapping[str, float]], title: str, y_label: str, top: float | None = None, digits: int = 2
) -> bytes:
    """Grouped bars: `groups[series][category] = height`, with the height written over each bar; `top` ends the axis."""
    bars = sum(map(len, groups.values()))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(max(7.5, 0.42 * bars), 4.2)  # room for the numbers over the bars
        draw_bars(axes, groups, title, y_label, top, digits)
        return png_bytes(figure)


def grouped_points(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    title: str,
    y_label: str,
    top: float | None = None,
    digits: int = 1,
) -> bytes:
    """`groups[series][category]` are the values of repetitions: each a dot, their mean a bar with its number over it."""
    bars = sum(map(len, groups.values()))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(max(11.0, 0.42 * bars), 4.2)
        means = {name: {key: float(np.mean(v)) for key, v in heights.items()} for name, heights in groups.items()}
        highest = {name: {key: max(v) for key, v in heights.items()} for name, heights in groups.items()}
        draw_bars(axes, means, title, y_label, top, digits, above=highest)
        width, categories = 0.8 / max(1, len(groups)), list(next(iter(groups.values())))
        for index, heights in enumerate(groups.values()):
            for category, values in heights.items():
                at = categories.index(category) + (index - (len(groups) - 1) / 2) * width
                axes.plot([at] * len(values), values, "o", color=INK, markersize=3, alpha=0.7)
        return png_bytes(figure)


def image_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    right: Sequence[bool | None],
    columns: int = 8,
    title: str = "",
) -> bytes:
    """Images [h, w, 3] uint8 in rows, each over its caption, blue and ticked if right, orange and crossed if wrong."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.4 * columns, 1.8 * rows + (0.4 if title else 0)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
        if title:
            figure.suptitle(plain(title), x=0.01, ha="left", fontweight="bold")
        draw_images(figure, images, captions, right, columns)
        return png_bytes(figure)


# ------------------------------------------------------------------------------------------- drawing on somebody's axes
def draw_curves(axes: Axes, curves: Curves, title: str, y_label: str, x_label: str):
    """What `loss_curves` draws, on the given axes."""
    for index, (name, (steps, values)) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
        if steps.shape != values.shape or steps.ndim != 1:
            raise ValueError(f"curve {name!r}: {steps.shape} steps and {values.shape} values; give one value a step")
        finite = np.isfinite(values)
        axes.plot(steps[finite], values[finite], color=colour, alpha=0.25, linewidth=1)
        style = dict(linewidth=2, linestyle=("-", "--", ":")[index // len(COLOURS) % 3])
        axes.plot(steps[finite], smooth(values[finite]), color=colour, label=plain(name), **style)
        if not finite.all():  # at the top of the axes, whatever the scale
            crosses = np.full(int((~finite).sum()), 0.98)
            axes.plot(steps[~finite], crosses, "x", color=colour, transform=axes.get_xaxis_transform())
    label_axes(axes, title, y_label, x_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True)
    if len(curves) > 1:
        axes.legend()


def draw_bars(
    axes: Axes,
    groups: Mapping[str, Mapping[str, float]],
    title: str,
    y_label: str,
    top: float | None,
    digits: int,
    above: Mapping[str, Mapping[str, float]] | None = None,
):
    """What `bar_chart` draws, on the given axes; `above` are the heights over which numbers stand, else the bars'."""
    categories = list(dict.fromkeys(category for heights in groups.values() for category in heights))
    width = 0.8 / max(1, len(groups))
    for index, (series, heights) in enumerate(groups.items()):
        at = [categories.index(category) + (index - (len(groups) - 1) / 2) * width for category in heights]
        axes.bar(at, list(heights.values()), 0.92 * width, color=COLOURS[index % len(COLOURS)], label=plain(series))
        for x, (category, height) in zip(at, heights.items(), strict=True):
            place = (x, (above or groups)[series][category])
            style = dict(ha="center", va="bottom", fontsize=8, color=MUTED)
            axes.annotate(f"{height:.{digits}f}", place, (0, 3), textcoords="offset points", **style)
    crowded = sum(len(category) for category in categories) > 60
    axes.set_xticks(
        range(len(categories)),
        [shorten(category, 18) for category in categories],
        rotation=30 if crowded else 0,
        ha="right" if crowded else "center",
    )
    axes.tick_params(axis="x", length=0)
    label_axes(axes, title, y_label, "")
    axes.margins(y=0.12)
    if top is not None:
        axes.set_ylim(0, top * 1.08)
    axes.grid(True, axis="y")
    if len(groups) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def draw_images(
    figure: Figure | SubFigure,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    right: Sequence[bool | None],
    columns: int,
):
    """What `image_grid` draws, on the given figure or part of one."""
    grid = figure.subplots(-(-len(images) // columns), columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, caption, good in zip(grid[: len(images)], images, captions, right, strict=True):
        draw_image(axes, image, caption, good)


def draw_image(axes: Axes, image: np.ndarray, caption: str, right: bool | None):
    """One image of `image_grid`, on the given axes. Small images keep their pixels."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
    axes.imshow(image, interpolation="nearest" if max(image.shape) <= 128 else "antialiased")
    axes.set_axis_off()
    sign = {True: "✓ ", False: "✗ ", None: ""}[right]
    colour = {True: RIGHT, False: WRONG, None: INK}[right]
    lines = "\n".join(shorten(line, 20) for line in caption.splitlines())
    axes.set_title(sign + lines, fontsize=9, color=colour, y=-0.06, va="top", loc="center", pad=0)


def label_axes(axes: Axes, title: str, y_label: str, x_label: str):
    """Title and labels, in characters that the font has."""
    axes.set_title(plain(title))
    axes.set_ylabel(plain(y_label))
    axes.set_xlabel(plain(x_label))


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Mean under a bell that is as wide (one deviation) as `share` of the curve. Centred, so it does not lag."""
    if not len(values):
        return values
    deviation = max(1e-6, share * len(values))
    reach = min(int(3 * deviation), (len(values) - 1) // 2)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    return np.convolve(values, bell, "same") / np.convolve(np.ones(len(values)), bell, "same")


def shorten(text: str, length: int) -> str:
    """`text` in plain characters, cut with an ellipsis beyond `length`."""
    text = plain(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def plain(text: str) -> str:
    """`text` with a box for every character that the font does not have."""
    known = _charmap()
    return "".join(c if ord(c) in known else " " if c.isspace() else "□" for c in text)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one set of axes, in inches, that no window system knows of."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def png_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", bbox_inches="tight", pad_inches=0.2)
    return buffer.getvalue()


@functools.cache
def _charmap() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(STYLE["font.family"]))
    return frozenset(font.get_charmap())

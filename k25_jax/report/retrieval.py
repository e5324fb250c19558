"""The figure of passkey retrieval: accuracy against length and depth, before and after long-context training."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from k25_jax.report.plots import COLOURS, INK, STYLE, Figure, label_axes, plain, png_bytes


def retrieval_figure(
    accuracy: Mapping[str, Sequence[float]],
    depths: Mapping[str, np.ndarray],
    lengths: Sequence[int],
    trained: int,
    title: str,
) -> bytes:
    """A PNG: `accuracy[model]` at each length as curves, then for each of `depths` a map [depth, length] of shares.

    A line marks the length that was trained first.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5 + 2.6 * len(depths), 4.4), layout="constrained")
        curves, *maps = figure.subplots(1, 1 + len(depths), width_ratios=[2.2] + [1] * len(depths))
        _curves(curves, accuracy, lengths, trained, title)
        for axes, (name, shares) in zip(maps, depths.items(), strict=True):
            _map(axes, shares, lengths, name)
        return png_bytes(figure)


def _curves(axes: Axes, accuracy: Mapping[str, Sequence[float]], lengths: Sequence[int], trained: int, title: str):
    places = np.arange(len(lengths))
    for index, (name, values) in enumerate(accuracy.items()):
        style = dict(color=COLOURS[index % len(COLOURS)], marker="osD^v"[index % 5], linewidth=2)
        axes.plot(places, values, label=plain(name), **style)
    axes.axvline(list(lengths).index(trained), color=INK, linewidth=1, linestyle=":")
    axes.set_xticks(places, [str(length) for length in lengths])
    axes.set_ylim(-0.03, 1.05)
    axes.grid(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)
    label_axes(axes, title, "passkeys given back", "tokens of the document (dotted: pre-training)")


def _map(axes: Axes, shares_NY: np.ndarray, lengths: Sequence[int], name: str):
    """Shares as colours and numbers; the beginning of the document is on top."""
    axes.imshow(shares_NY, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (row, column), share in np.ndenumerate(shares_NY):
        if np.isfinite(share):
            colour = "white" if share < 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    bins = len(shares_NY)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks([-0.5, bins - 0.5], ["0", "1"])
    label_axes(axes, name, "depth of the passkey", "tokens")
    axes.title.set_fontsize(10)

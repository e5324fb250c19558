"""A report as one HTML file that needs nothing else: no link, no script, images inside. And as one PNG.

A report is a title and a list of sections, one dataclass each. Everything that they hold is escaped.
"""

import base64
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas
from PIL import Image

from k25_jax.report import plots
from k25_jax.runtime.paths import AnyPath, to_path, write


@dataclass(frozen=True)
class Sample:
    """A question, the model's answer, the right answer ("" if there is none), the score (None if it was not scored)."""

    question: str
    answer: str
    gold: str = ""
    score: float | None = None
    image: np.ndarray | None = None  # uint8 [h, w, 3]

    @property
    def right(self) -> bool | None:
        return None if self.score is None else self.score >= 1


@dataclass(frozen=True)
class Text:
    """Paragraphs, with an empty line between them."""

    title: str
    text: str


@dataclass(frozen=True)
class KeyFigures:
    """Numbers that stand out: `values[name] = "98.3 %"`."""

    title: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """Rows of cells; a number is shown to 4 digits and aligned right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG, as `report.plots` makes it. The caption is also its text for those who cannot see it."""

    title: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Samples:
    """Cards with an image, the question, the model's answer and the right one."""

    title: str
    samples: Sequence[Sample]
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Commands or code, word for word."""

    title: str
    code: str


@dataclass(frozen=True)
class Config:
    """A configuration as JSON, folded away."""

    title: str
    values: Mapping = field(default_factory=dict)


Section = Text | KeyFigures | Table | Figure | Samples | Code | Config


def write_report(path: str | os.PathLike, title: str, sections: Sequence[Section]) -> AnyPath:
    """Write the report as one HTML file and return its path. The file appears whole or not at all."""
    body = "\n".join(
        f"<section>\n<h2>{escape(section.title)}</h2>\n{render(section)}\n</section>" for section in sections
    )
    return replace(path, page(title, body).encode())


def page(title: str, body: str, style: str = "") -> str:
    """A whole page; `body` is HTML in which everything is escaped, `style` more rules for it."""
    return _PAGE.format(title=escape(title), style=_STYLE + style, body=body)


def report_png(
    path: str | os.PathLike,
    title: str,
    key_figures: Mapping[str, str],
    curves: plots.Curves,
    samples: Sequence[Sample],
    subtitle: str = "",
    y_label: str = "loss (nats per token)",
) -> AnyPath:
    """Write an overview as one picture: title, key figures, loss curves, and up to 16 samples that have an image."""
    shown = [sample for sample in samples if sample.image is not None][:16]
    rows = -(-len(shown) // 8)
    with matplotlib.rc_context(plots.STYLE):
        canvas = Canvas(figsize=(12, 5.8 + 1.95 * rows), layout="constrained")
        canvas.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        bands = canvas.subfigures(3, 1, height_ratios=[1.7, 4.1, max(0.01, 1.95 * rows)])
        _draw_head(bands[0], title, subtitle, key_figures)
        plots.draw_curves(bands[1].subplots(), curves, "Loss", y_label, "step")
        if shown:
            images, captions = [sample.image for sample in shown], [_caption(sample) for sample in shown]
            plots.draw_images(bands[2], images, captions, [sample.right for sample in shown], columns=8)
        return replace(path, plots.png_bytes(canvas, dpi=110))


# ------------------------------------------------------------------------------------------------------------- sections
def render(section: Section) -> str:
    """A section without its title, as HTML."""
    match section:
        case Text(text=text):
            return "\n".join(f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())
        case KeyFigures(values=values):
            tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
            return f'<dl class="key">{"".join(tiles)}</dl>'
        case Table():
            return _table(section)
        case Figure(png=png, caption=caption):
            image = f'<img src="{data_uri(png)}" alt="{escape(caption)}">'
            return f'<figure class="plot">{image}<figcaption>{escape(caption)}</figcaption></figure>'
        case Samples(samples=samples, caption=caption):
            return f'<p>{escape(caption)}</p><div class="cards">{"".join(map(_card, samples))}</div>'
        case Code(code=code):
            return f"<pre><code>{escape(code)}</code></pre>"
        case Config(values=values):
            text = escape(json.dumps(values, indent=2, default=str, ensure_ascii=False))
            return f"<details><summary>Show the configuration</summary><pre><code>{text}</code></pre></details>"
    raise TypeError(f"a report has no section of type {type(section).__name__}; use one of {Section}")


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"table {table.title!r}: a row has {len(row)} cells under {len(table.columns)} columns: {row}"
            )
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td class="number">{value if isinstance(value, int) else format(value, ".4g")}</td>'


def _card(sample: Sample) -> str:
    kind = {True: "right", False: "wrong", None: ""}[sample.right]
    sign = {True: "✓ ", False: "✗ ", None: ""}[sample.right]
    image = ""
    if sample.image is not None:
        image = picture(sample.image, "image of: " + sample.question)
    lines = [f'<p class="question">{escape(sample.question)}</p>']
    lines.append(f'<p class="answer">{sign}{escape(sample.answer) or "(nothing)"}</p>')
    if sample.gold and not sample.right:
        lines.append(f'<p class="gold">right: {escape(sample.gold)}</p>')
    if sample.score is not None and 0 < sample.score < 1:
        lines.append(f'<p class="gold">score {sample.score:.2f}</p>')
    return f'<div class="card {kind}">{image}{"".join(lines)}</div>'


# -------------------------------------------------------------------------------------------------------------- details
def _draw_head(band, title: str, subtitle: str, key_figures: Mapping[str, str]):
    band.text(0.01, 1.0, plots.plain(title), fontsize=20, fontweight="bold", va="top")
    band.text(0.01, 0.72, plots.plain(subtitle), fontsize=11, color=plots.MUTED, va="top")
    for index, (name, value) in enumerate(key_figures.items()):
        at = 0.01 + index * 0.98 / max(5, len(key_figures))
        band.text(at, 0.28, plots.shorten(value, 14), fontsize=19, fontweight="bold", color=plots.COLOURS[0])
        band.text(at, 0.15, plots.shorten(name, 28), fontsize=9, color=plots.MUTED)


def _caption(sample: Sample) -> str:
    answer = sample.answer or "(nothing)"
    return answer if sample.right or not sample.gold else f"{answer}\nright: {sample.gold}"


def escape(text: str) -> str:
    """Text as it may stand in a page, between tags or in quotes."""
    return html.escape(str(text), quote=True)


def data_uri(png: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def picture(image: np.ndarray, words: str) -> str:
    """uint8 [h, w, 3] as a tag; a small one keeps its pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    pixels = ' class="pixels"' if max(image.shape) <= 128 else ""
    return f'<img{pixels} src="{data_uri(buffer.getvalue())}" alt="{escape(words)}">'


def replace(path: str | os.PathLike, content: bytes) -> AnyPath:
    """Write a file, whole or not at all, and return its path."""
    path = to_path(path)
    write(path, content)
    return path


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #5a6672; --page: #ffffff; --card: #f4f6f8; --line: #d5dbe1;
  --right: #00609a; --wrong: #b34a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --muted: #a3adb8; --page: #14181c; --card: #1f252b;
  --line: #3a434c; --right: #6cbcf0; --wrong: #ff9d5c; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p { max-width: 46rem; white-space: pre-line; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 0; }
.key div, .card, pre { background: var(--card); border-radius: .5rem; }
.key div { padding: .75rem 1rem; display: flex; flex-direction: column-reverse; }
.key dt { color: var(--muted); font-size: .85rem; }
.key dd { margin: 0; font-size: 1.4rem; font-weight: 650; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .4rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.number { text-align: right; }
figure { margin: 0; }
figure.plot img { max-width: 100%; background: #ffffff; border-radius: .5rem; }
figcaption { color: var(--muted); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; }
.card { padding: .6rem; border-left: .3rem solid var(--line); overflow-wrap: anywhere; }
.card.right { border-color: var(--right); }
.card.wrong { border-color: var(--wrong); }
.card img { display: block; width: 100%; height: 7.5rem; object-fit: contain; }
.card img.pixels { image-rendering: pixelated; }
.card p { margin: .25rem 0 0; font-size: .9rem; }
.question, .gold { color: var(--muted); }
.answer { font-weight: 650; }
.right .answer { color: var(--right); }
.wrong .answer { color: var(--wrong); }
pre { padding: .8rem 1rem; overflow-x: auto; font: .85rem/1.5 ui-monospace, monospace; }
summary { cursor: pointer; }
"""

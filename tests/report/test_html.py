import base64
import io
import json
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from k25_jax.report import html as report
from k25_jax.report import plots
from pages import Page

CURVES = {"train": (range(50), np.linspace(3, 1, 50)), "test": (range(50), np.linspace(3, 2, 50))}
NASTY = "<script>alert(\"1\")</script> & 'quotes' {braces} %s 中文"


def _image(value=200):
    return np.full((28, 42, 3), value, np.uint8)


def _sections(text="fine"):
    samples = [
        report.Sample(text, text, text, 0.0, _image()),
        report.Sample("digit?", "7", "7", 1.0, _image(100)),
        report.Sample("word?", "clas", "class", 0.8),
        report.Sample("and then?", ""),
    ]
    return [
        report.Text(text, f"{text}\n\nsecond paragraph"),
        report.KeyFigures("Key figures", {text: text, "accuracy": "98.3 %"}),
        report.Table(text, ["name", text], [[text, 3], ["b", 0.123456]], caption=text),
        report.Figure(text, plots.loss_curves(CURVES), text),
        report.Samples(text, samples, text),
        report.Code(text, f"k25 train {text}"),
        report.Config(text, {text: {"layers": 3, "names": [text]}}),
    ]


def test_a_report_holds_every_section(tmp_path):
    path = report.write_report(tmp_path / "new/report.html", "A run", _sections())
    page = Page(path.read_text())
    assert page.tags.count("h1") == 1 and page.tags.count("h2") == len(_sections())
    for part in (
        "A run",
        "second paragraph",
        "98.3 %",
        "0.1235",
        "✗ fine",
        "✓ 7",
        "right: class",
        "score 0.80",
        "(nothing)",
    ):
        assert part in page.text, part
    assert page.text.count("right: ") == 2  # not under the right answer
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_report_needs_nothing_else(tmp_path):
    text = report.write_report(tmp_path / "r.html", "A run", _sections()).read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert ("html", "lang", "en") in page.attributes
    assert all(value for tag, name, value in page.attributes if tag == "img" and name == "alt")


def test_everything_is_escaped(tmp_path):
    text = report.write_report(tmp_path / "r.html", NASTY, _sections(NASTY)).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags == Page(report.write_report(tmp_path / "s.html", "fine", _sections()).read_text()).tags
    assert page.text.count(NASTY) >= 12
    assert json.loads(page.text[page.text.index('{\n  "') :].rpartition("}")[0] + "}")[NASTY]["layers"] == 3


def test_images_come_back_from_the_page(tmp_path):
    text = report.write_report(tmp_path / "r.html", "A run", [report.Samples("S", _sections()[4].samples)]).read_text()
    first, second = (base64.b64decode(part) for part in re.findall(r'base64,([^"]+)"', text))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(first))), _image())
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(second))), _image(100))


def test_both_colour_schemes_are_readable():
    """Contrast of text on its ground, as WCAG 2 counts it, is at least 4.5 in the light and the dark scheme."""
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in report._STYLE.split("@media")[:2]]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    for scheme in schemes:
        for ink in ("ink", "muted", "right", "wrong"):
            for ground in ("page", "card"):
                light, dark = sorted((_luminance(scheme[ink]), _luminance(scheme[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground, scheme[ink])


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return float(
        np.dot([0.2126, 0.7152, 0.0722], [p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4 for p in parts])
    )


def test_a_row_of_the_wrong_length_is_named(tmp_path):
    with pytest.raises(ValueError, match="table 'T': a row has 1 cells under 2 columns"):
        report.write_report(tmp_path / "r.html", "A run", [report.Table("T", ["a", "b"], [["x"]])])
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize("count, rows", [(0, 0), (3, 1), (30, 2)])
def test_the_overview_is_one_picture(tmp_path, count, rows):
    samples = [report.Sample("digit?", str(i), "7", float(i == 7), _image()) for i in range(count)]
    samples.append(report.Sample("no image", "x"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = report.report_png(
            tmp_path / "r.png", NASTY, {"accuracy": "98.3 %", "steps": "3,000"}, CURVES, samples, NASTY
        )
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape[1] > 1000
    grey = np.abs(picture - 200).max(2) == 0  # the samples' own colour
    bands = np.flatnonzero(np.diff(np.concatenate([[0], grey.sum(1) > 50, [0]])) == 1)
    assert len(bands) == rows
    assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()  # a margin: nothing is cut off

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from k25_jax.report import plots


@pytest.fixture(autouse=True)
def _no_warnings():
    """matplotlib warns of missing glyphs and of labels that do not fit; a figure must give no cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def _ink(png, colour):
    """How many pixels have this colour, nearly."""
    target = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(_pixels(png) - target).max(2) < 12).sum())


def _curve(points=200, level=0.0):
    steps = np.arange(points) * 10
    return steps, level + 3 * np.exp(-steps / 500) + np.random.default_rng(0).normal(0, 0.1, points)


def test_each_curve_has_its_colour():
    png = plots.loss_curves({"a": _curve(), "b": _curve(level=1)}, title="Loss")
    assert _ink(png, plots.COLOURS[0]) > 500 and _ink(png, plots.COLOURS[1]) > 500 and _ink(png, plots.COLOURS[2]) == 0


def test_the_same_curves_give_the_same_bytes():
    assert plots.loss_curves({"a": _curve()}) == plots.loss_curves({"a": _curve()})


@pytest.mark.parametrize("points", [0, 1, 2])
def test_short_curves_are_drawn(points):
    assert _pixels(plots.loss_curves({"a": _curve(points)})).shape[1] > 600


def test_steps_without_a_finite_loss_are_marked():
    steps, values = _curve(30)
    assert _ink(plots.loss_curves({"a": (steps[:0], values[:0])}), plots.COLOURS[0]) == 0
    nothing_but_crosses = {"a": (steps, np.where(steps % 20, np.nan, np.inf))}
    assert _ink(plots.loss_curves(nothing_but_crosses), plots.COLOURS[0]) > 500


def test_a_curve_with_a_missing_value_is_named():
    with pytest.raises(ValueError, match="curve 'a': .* give one value a step"):
        plots.loss_curves({"a": (np.arange(3), np.zeros(2))})


def test_the_mean_of_a_constant_is_the_constant_and_of_a_line_nearly_the_line():
    np.testing.assert_allclose(plots.smooth(np.full(100, 2.5)), 2.5)
    np.testing.assert_allclose(plots.smooth(np.arange(500.0))[40:-40], np.arange(500.0)[40:-40], atol=1e-6)
    noise = np.random.default_rng(0).normal(size=1000)
    assert plots.smooth(noise).std() < 0.25 * noise.std()


def test_bars_are_as_high_as_their_values():
    one, half = (_ink(plots.bar_chart({"s": {"a": h}}, "T", "share", top=1), plots.COLOURS[0]) for h in (1.0, 0.5))
    assert one / half == pytest.approx(2, rel=0.1)


def test_many_bars_with_long_names_fit():
    groups = {f"series {i}": {f"a rather long category {j}": i + j for j in range(9)} for i in range(3)}
    png = plots.bar_chart(groups, "Scores", "score (points)", digits=0)
    assert all(_ink(png, colour) > 500 for colour in plots.COLOURS[:3])


def test_right_and_wrong_answers_have_their_colours():
    images = [np.full((28, 28, 3), 200, np.uint8)] * 3
    right = plots.image_grid(images, ["7", "8", "9"], [True] * 3)
    wrong = plots.image_grid(images, ["7", "8", "9"], [False] * 3)
    unknown = plots.image_grid(images, ["7", "8", "9"], [None] * 3)
    assert _ink(right, plots.RIGHT) > 30 and _ink(right, plots.WRONG) == 0
    assert _ink(wrong, plots.WRONG) > 30 and _ink(wrong, plots.RIGHT) == 0
    assert _ink(unknown, plots.WRONG) == _ink(unknown, plots.RIGHT) == 0


def test_captions_of_any_characters_are_drawn():
    images = [np.zeros((28, 56, 3), np.uint8)] * 4
    captions = ["$x_1$ \\frac", "中文 \x00\x07 \ufffd", "a very long answer that goes on and on", ""]
    assert _ink(plots.image_grid(images, captions, [True, False, None, None], title="$ 中"), "#000000") > 1000
    assert plots.plain("a$\t中é") == "a$ □é"
    assert plots.shorten("abcdef", 4) == "abc…" and plots.shorten("abcd", 4) == "abcd"


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)])
def test_what_is_no_image_is_named(image):
    with pytest.raises(ValueError, match=r"must be uint8 \[height, width, 3\], not"):
        plots.image_grid([image], ["x"], [None])


def test_captions_that_do_not_match_the_images_are_refused():
    with pytest.raises(ValueError):
        plots.image_grid([np.zeros((8, 8, 3), np.uint8)] * 2, ["one"], [None, None])

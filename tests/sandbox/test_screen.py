"""A text that draws its lines again, as a terminal shows it in the end."""

import random

import pytest

from k25_jax.sandbox.screen import COLUMNS, ROWS, Screen, clean


def shown(*pieces, most=10**6):
    screen = Screen(most)
    for piece in pieces:
        screen.write(piece)
    return str(screen.excerpt())


@pytest.mark.parametrize(
    "text, seen",
    [
        ("", ""),
        ("a\nb\n", "a\nb\n"),
        ("a\r\nb\r\n", "a\nb\n"),
        ("abc\rX", "Xbc"),
        ("10%\r20%\r100%\nend", "100%\nend"),
        ("abc\r", "abc"),
        ("100%\r50%", "50%%"),
        ("abc\b\bX", "aXc"),
        ("a\b\b\bX", "X"),
        ("abc\r\x1b[KX", "X"),
        ("abc\x1b[1KX", "   X"),
        ("abc\x1b[2K\rX", "X"),
        ("abc\x1b[2DX", "aXc"),
        ("a\x1b[3CX", "a   X"),
        ("abc\x1b[2GX", "aXc"),
        ("one\ntwo\x1b[1A\rONE\x1b[1B\rTWO", "ONE\nTWO"),
        ("one\ntwo\x1b[FX", "Xne\ntwo"),
        ("one\ntwo\nthree\x1b[2A\r\x1b[JX", "X"),
        ("one\ntwo\x1b[2J\x1b[HX", "X"),
        ("one\n\x1b[AX\nY\nZ", "Xne\nY\nZ"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[38;2;1;2;3mx\x1b[?25l\x1b[?25h", "x"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b(Bx\x1b=", "x"),
        ("bell\x07", "bell"),
        ("tab\there", "tab\there"),
        ("done      \r    \rX", "X"),
        ("\x1b[99999999999999999999CX", " " * COLUMNS + "X"),
        ("\x1b[99999A\x1b[99999BX", "X"),
    ],
)
def test_what_is_shown(text, seen):
    assert shown(text) == seen and shown(*text) == seen  # in whatever pieces


def test_pieces_make_no_difference():
    rng = random.Random(0)
    marks = [
        "\r",
        "\n",
        "\b",
        "\x1b[A",
        "\x1b[2K",
        "\x1b[31m",
        "\x1b]8;;u\x1b\\",
        "\x1b[K",
        "\x1b[3D",
        "ab",
        "c",
        "\U0001f600",
        "  ",
    ]
    for _ in range(200):
        text = "".join(rng.choice(marks) for _ in range(60))
        cuts = sorted(rng.choices(range(len(text) + 1), k=5))
        assert shown(*(text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True))) == shown(text)


def test_without_control_nothing_changes():
    for text in ("x" * (3 * COLUMNS), "\n" * (3 * ROWS), "line\n" * 1000 + "end", "é\u2028\x0bz\n"):
        assert shown(text) == text == shown(*text)


def test_long_lines_and_many_rows_are_kept_and_counted():
    text = "a" * 10**6 + "b" * 9
    assert shown(text, most=10) == f"aaaaa\n[.. {10**6 - 1} characters left out ..]\nbbbbb"
    assert shown(*(f"{i}\r" for i in range(10**5)), most=100) == "99999"


def test_clean():
    assert clean("a\ud800b") == "a\ufffdb" and clean("\ud83d\ude00") == "\U0001f600" and clean("\udc80") == "\ufffd"

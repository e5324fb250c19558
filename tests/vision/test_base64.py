"""Base64 as browsers read it, against the standard library's strict reading."""

import base64
import random
import urllib.parse

import pytest

from k25_jax.vision.base64 import decode_base64, is_data_url, read_data_url

SAMPLES = [bytes(random.Random(seed).randbytes(seed)) for seed in range(0, 200, 7)] + [b"\xfb\xff\xfe", b"a", b"ab"]


@pytest.mark.parametrize("write", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
def test_both_alphabets_with_lines_spaces_and_missing_padding(write):
    for data in SAMPLES:
        text = write(data).decode()
        for form in (text, text.replace("=", ""), f" \t{text}\r\n", "\f\r\n".join(text), text.replace("=", "\n=")):
            assert decode_base64(form) == decode_base64(form.encode()) == data


@pytest.mark.parametrize("text", ["a", "abcde", "ab=c", "a*cd", "éabc", "a%41b", "=abc", "ab.c", "\0abc"])
def test_what_is_no_base64_is_an_error(text):
    with pytest.raises(ValueError, match="is not base64: .*(no place in it|end is missing)"):
        decode_base64(text)


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "data:;base64,",
        "DATA:IMAGE/PNG;charset=x;BASE64, ",
        " data:image/png; base64 ,\n",
        "data:image/svg+xml;charset=utf-8;name=a.png;Base64,",
    ],
)
def test_data_urls_of_base64(head):
    for data in SAMPLES:
        text = base64.b64encode(data).decode()
        for form in (text, urllib.parse.quote(text), urllib.parse.quote(text, safe="")):
            assert is_data_url(head + form) and read_data_url(head + form) == data
        assert read_data_url(head + text + "#part") == data


def test_data_urls_without_base64_are_percent_encoded():
    for data in SAMPLES:
        assert read_data_url("data:image/png," + urllib.parse.quote_from_bytes(data)) == data
        assert read_data_url("data:base64," + urllib.parse.quote_from_bytes(data)) == data  # a type, no parameter
    draw = random.Random(5)
    for _ in range(2000):
        text = "".join(draw.choice("%%%4a1Fg") for _ in range(draw.randrange(12)))
        assert read_data_url("data:," + text) == urllib.parse.unquote_to_bytes(text)


@pytest.mark.parametrize(
    "url", ["data:image/png;base64", "data", "file:///data:,x", "http://a/data:image/png;base64,YQ=="]
)
def test_what_is_no_data_url(url):
    with pytest.raises(ValueError, match="is not a data URL"):
        read_data_url(url)

"""Base64 and data URLs, read as browsers read them: line breaks, no padding, both alphabets."""

import binascii

import numpy as np

SPACE = b" \t\n\r\f"
SIGNS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
URL_SAFE = bytes.maketrans(b"-_", b"+/")
HEX = np.full(256, 16, np.uint8)
HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = range(16)
HEX[np.frombuffer(b"ABCDEF", np.uint8)] = range(10, 16)


def decode_base64(text: str | bytes) -> bytes:
    """Base64 in either alphabet; space in it and missing padding are no mistakes. Raises ValueError."""
    raw = (text.decode("ascii", "replace") if isinstance(text, bytes) else text).encode("ascii", "replace")
    digits = raw.translate(URL_SAFE, SPACE)
    for _ in range(2):
        digits = digits.removesuffix(b"=")
    try:
        return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4), strict_mode=True)
    except binascii.Error:
        strange = digits.strip(SIGNS)[:1]
        reason = f"{strange.decode()!r} has no place in it" if strange else "its end is missing"
        raise ValueError(f"is not base64: {reason}") from None


def is_data_url(url: str) -> bool:
    """Whether the data stand in the address itself."""
    return url[:64].lstrip()[:5].lower() == "data:"


def read_data_url(url: str) -> bytes:
    """The bytes in `data:TYPE;base64,..`, or percent-encoded ones without base64. Raises ValueError."""
    head, comma, body = url.partition(",")
    if not comma or not is_data_url(head):
        raise ValueError("is not a data URL: it must read data:image/png;base64,..")
    data = _percent_decoded(body.partition("#")[0].encode("utf-8", "replace"))
    *_, last = head.split(";")
    if last.strip().lower() == "base64" and ";" in head:
        return decode_base64(data)
    return data


def _percent_decoded(data: bytes) -> bytes:
    """%41 to A; what is no such pair of digits stays. In whole arrays: a body may hold millions of them."""
    if b"%" not in data or len(data) < 3:
        return data
    given = np.frombuffer(data, np.uint8)
    digits = HEX[given]
    begins = np.zeros(len(given), bool)
    begins[:-2] = (given[:-2] == ord("%")) & (digits[1:-1] < 16) & (digits[2:] < 16)
    out, kept = given.copy(), np.ones(len(given), bool)
    out[:-2][begins[:-2]] = (digits[1:-1] * 16 + digits[2:])[begins[:-2]]
    kept[1:] &= ~begins[:-1]
    kept[2:] &= ~begins[:-2]
    return out[kept].tobytes()

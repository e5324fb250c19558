import base64
import json
import random

import pytest
import regex

from k25_jax.config import BYTE_IDS
from k25_jax.text.tokenizer import (
    BYTE_SPECIAL,
    MAX_CHARS,
    MAX_RUN,
    PUBLIC_SPECIAL,
    SPLIT_PATTERN,
    StreamDecoder,
    TokenizerError,
    load_tokenizer,
    pieces,
)

# Longer tokens; each is two others joined, as training makes them.
WORDS = ["th", "the", " the", "in", "ing", "00", "000", "  ", "\n\n", "'s", "ab", "aba", "é"]
MERGES = [word.encode() for word in WORDS]
MERGES += [b"\xe4\xb8", "中".encode(), " 中".encode(), b"\xe6\x96", "文".encode(), "中文".encode()]
ALPHABET = "theinggab中文字あé'sST  \n\r\t0123.,-!<|>_🙂\u0301\u200d"


def write_model(folder, merges=MERGES, config=None):
    """A tiktoken.model with all bytes and a few longer tokens; returns token bytes -> rank."""
    tokens = [bytes([i]) for i in range(256)] + merges
    assert len(set(tokens)) == len(tokens)
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {token: rank for rank, token in enumerate(tokens)}


def brute_force(text, ranks):
    """Byte-pair encoding by its definition: in each piece, always merge the first pair of the lowest rank."""
    ids = []
    for piece in regex.findall(SPLIT_PATTERN, text, flags=regex.V1):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [(ranks.get(a + b, 10**9), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
            if not pairs or min(pairs)[0] == 10**9:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def random_text(generator, length):
    def character():
        if generator.random() < 0.7:
            return generator.choice(ALPHABET)
        code = generator.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    return "".join(character() for _ in range(length))


@pytest.fixture(params=["bytes", "tiktoken"])
def tokenizer(request, tmp_path):
    if request.param == "bytes":
        return load_tokenizer()
    write_model(tmp_path)
    return load_tokenizer(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------- encoding
def test_round_trip_of_random_unicode(tokenizer):
    generator = random.Random(0)
    for length in [0, 1, 2, 5, 40, 300] * 5:
        text = random_text(generator, length)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tiktoken_equals_byte_pair_encoding_by_definition(tmp_path):
    ranks = write_model(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    generator = random.Random(1)
    for _ in range(100):
        text = "".join(generator.choice(ALPHABET) for _ in range(generator.randrange(60)))
        assert tokenizer.encode(text) == brute_force(text, ranks), text


def test_split_pattern_cuts_as_kimi_does():
    def split(text):
        return regex.findall(SPLIT_PATTERN, text, flags=regex.V1)

    assert split("中文English混合") == ["中文", "English", "混合"]
    assert split("北京市 Pascal") == ["北京市", " Pascal"]
    assert split("1234567") == ["123", "456", "7"]
    assert split("camelCase It's HTTPServer") == ["camel", "Case", " It's", " HTTPServer"]
    assert split("a  b\n\n c!?\n") == ["a", " ", " b", "\n\n", " c", "!?\n"]
    assert split("x   ") == ["x", "   "]


def test_byte_level_ids_are_the_bytes():
    tokenizer = load_tokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.vocab_size == 277
    assert sorted(tokenizer.special.values()) == list(range(256, 277))
    assert {name: tokenizer.special[f"<|{name.removesuffix('_id')}|>"] for name in BYTE_IDS if "media" in name} == {
        name: id_ for name, id_ in BYTE_IDS.items() if "media" in name
    }
    assert BYTE_IDS["pad_id"] == tokenizer.special["[PAD]"] and BYTE_IDS["eos_ids"] == (
        tokenizer.special["<|im_end|>"],
    )


def test_surrogates_are_joined_or_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


# ------------------------------------------------------------------------------------------------------- special tokens
def test_text_that_looks_special_is_ordinary(tokenizer):
    special = set(tokenizer.special.values())
    for name in [*BYTE_SPECIAL, "<|reserved_token_163700|>"]:
        for text in (name, f"a{name}b", name * 3):
            ids = tokenizer.encode(text)
            assert not special & set(ids)
            assert tokenizer.decode(ids) == text


def test_special_tokens_when_allowed(tokenizer):
    text = "a<|im_end|>b<think>c"
    end, think = tokenizer.special["<|im_end|>"], tokenizer.special["<think>"]
    a, b, c = (tokenizer.encode(letter) for letter in "abc")
    assert tokenizer.encode(text, allow_special=True) == [*a, end, *b, think, *c]
    only_think = tokenizer.encode(text, allow_special=["<think>"])
    assert think in only_think and end not in only_think
    assert tokenizer.decode(only_think) == text
    assert tokenizer.decode([end, *a, think], skip_special=True) == "a"
    assert tokenizer.decode([end, *a]) == "<|im_end|>a"


def test_public_table_and_reserved_names(tmp_path):
    write_model(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert {name: tokenizer.special[name] for name in PUBLIC_SPECIAL} == PUBLIC_SPECIAL
    assert tokenizer.vocab_size == 163840
    first = 256 + len(MERGES)
    assert tokenizer.decode([first, first + 255]) == f"<|reserved_token_{first}|><|reserved_token_{first + 255}|>"


def test_special_tokens_of_the_configuration_come_first(tmp_path):
    decoder = {
        "300": {"content": "<|im_end|>"},
        "163602": {"content": "<|other|>"},
        "301": {"content": "<|media_begin|>"},
    }
    write_model(tmp_path, config={"added_tokens_decoder": decoder})
    special = load_tokenizer(str(tmp_path)).special
    assert (special["<|im_end|>"], special["<|other|>"], special["<|media_begin|>"]) == (300, 163602, 301)
    assert special["<|media_end|>"] == 163604
    assert "<|reserved_token_300|>" not in special and len(set(special.values())) == len(special)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"added_tokens_decoder": {"97": {"content": "<|im_end|>"}}}, r"added_tokens_decoder\[97\]"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "must map ids"),
        ({"added_tokens_decoder": {"300": "a"}}, "must map ids"),
        ({"added_tokens_decoder": {"300": {"content": 5}}}, "cannot be a special token"),
        ([], "must be an object"),
        ({"added_tokens_decoder": ["a"]}, "must map ids"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "must map ids"),
        ({"added_tokens_decoder": {"163602": {"content": "<|other|>"}}}, r"no id for <\|media_begin\|>"),
    ],
)
def test_bad_configuration_is_named(tmp_path, config, message):
    write_model(tmp_path, config=config)
    with pytest.raises(TokenizerError, match=f"tokenizer_config.json.*{message}"):
        load_tokenizer(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------- decoding
def test_decode_never_raises(tokenizer):
    assert tokenizer.decode([10**9, -1, 97]) == "\ufffd\ufffda"
    assert tokenizer.decode([0xC3, 97]) == "\ufffda"
    generator = random.Random(2)
    for _ in range(50):
        assert isinstance(tokenizer.decode([generator.randrange(-5, tokenizer.vocab_size + 5) for _ in range(30)]), str)


def test_stream_decoder_equals_decode(tokenizer):
    generator = random.Random(3)
    for _ in range(100):
        ids = tokenizer.encode(random_text(generator, 20))
        for _ in range(generator.randrange(4)):  # break some characters
            ids.insert(
                generator.randrange(len(ids)), generator.choice([0xC3, 0xF0, 0x80, tokenizer.special["<think>"]])
            )
        for skip in (False, True):
            stream = StreamDecoder(tokenizer, skip)
            parts = [stream.push(id_) for id_ in ids] + [stream.flush()]
            assert "".join(parts) == tokenizer.decode(ids, skip)


def test_stream_decoder_holds_back_half_a_character():
    stream = StreamDecoder(load_tokenizer())
    assert [stream.push(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert stream.push(0xC3) == "" and stream.flush() == "\ufffd"


# ----------------------------------------------------------------------------------------------------------- long texts
def slow_pieces(text):
    """Kimi's rule, one character at a time: windows, in which a run of one class is cut every MAX_RUN characters."""
    out = []
    for begin in range(0, len(text), MAX_CHARS):
        current, run = "", 0
        window = text[begin : begin + MAX_CHARS]
        for i, character in enumerate(window):
            run = run + 1 if i and window[i - 1].isspace() == character.isspace() else 1
            if run > MAX_RUN:
                out.append(current)
                current, run = "", 1
            current += character
        out.append(current)
    return out


def test_long_runs_are_cut():
    text = "a" * (2 * MAX_RUN + 10) + " " * MAX_RUN + "b c" + "d" * (MAX_RUN + 1) + " " + "x y " * 120_000
    assert len(text) > MAX_CHARS
    assert list(pieces(text)) == slow_pieces(text)
    assert "".join(pieces(text)) == text
    assert list(pieces("")) == []


def test_a_long_run_encodes(tmp_path):
    write_model(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    for text in ("ab" * 300_000, " " * 300_000, "中" * 100_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("line", ["!!! 400", "YWJj", "YWJj x", "YWJj 4 5", "YWJj -1", "YQ== 400", "YWJj 3", " 400"])
def test_corrupt_model_names_the_line(tmp_path, line):
    write_model(tmp_path)
    lines = (tmp_path / "tiktoken.model").read_text().splitlines()
    lines.insert(260, line)
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    with pytest.raises(TokenizerError, match=r"tiktoken\.model:261"):
        load_tokenizer(str(tmp_path))


def test_binary_and_short_models_are_refused(tmp_path):
    (tmp_path / "tiktoken.model").write_bytes(random.Random(0).randbytes(3000))
    with pytest.raises(TokenizerError, match=r"tiktoken\.model:1:"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tiktoken.model").write_text("YQ== 0\n")
    with pytest.raises(TokenizerError, match="255 of 256 are missing"):
        load_tokenizer(str(tmp_path))


def test_directories(tmp_path):
    with pytest.raises(TokenizerError, match=f"{tmp_path} holds no vocabulary"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="no such directory"):
        load_tokenizer(str(tmp_path / "missing"))

import base64

import numpy as np
import pytest

from k25_jax.text.chat import ChatError, render
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer

TOKENIZER = load_tokenizer()


def ids(template):
    """Tokens of a string in which «name» stands for a special token."""
    out = []
    for i, part in enumerate(template.replace("»", "«").split("«")):
        out += [BYTE_SPECIAL[part]] if i % 2 else list(part.encode())
    return out


def turn(role, content):
    return f"«<|im_{role}|>»{role}«<|im_middle|>»{content}«<|im_end|>»"


def load_media(part):
    """Three chunks for a video, one clip without a time for an image."""
    if "image" in part:
        return [(None, f"clip of {part['image']}")]
    return [(f"00:00:0{second}.000", f"{part['video']} at {second}") for second in (0, 2, 4)]


IMAGE = "«<|media_begin|>»image«<|media_content|>»«<|media_pad|>»«<|media_end|>»"
VIDEO = "«<|media_begin|>»video«<|media_content|>»«<|media_pad|>»«<|media_end|>»"


def test_turns_and_weights():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi é"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
    ]
    rendered = render(messages, TOKENIZER)
    texts = [turn(message["role"], message["content"]) for message in messages]
    assert rendered.tokens == ids("".join(texts))
    weights = []
    for message, text in zip(messages, texts, strict=True):
        taught = len(message["content"].encode()) + 1 if message["role"] == "assistant" else 0
        weights += [0.0] * (len(ids(text)) - taught) + [1.0] * taught
    assert rendered.weights == weights
    assert not rendered.clips and not rendered.media


def test_generation_prompt_has_no_weight():
    messages = [{"role": "user", "content": "hi"}]
    rendered = render(messages, TOKENIZER, add_generation_prompt=True)
    assert rendered.tokens == ids(turn("user", "hi") + "«<|im_assistant|>»assistant«<|im_middle|>»")
    assert not any(rendered.weights)


def test_images_and_videos():
    content = [
        {"type": "text", "text": "see "},
        {"type": "image", "image": "cat.png"},
        {"type": "video", "video": "dog.mp4"},
        {"type": "text", "text": " now"},
    ]
    rendered = render([{"role": "user", "content": content}], TOKENIZER, load_media)
    video = "".join(f"00:00:0{second}.000{VIDEO}" for second in (0, 2, 4))
    assert rendered.tokens == ids(turn("user", f"see {IMAGE}{video} now"))
    assert rendered.media == ["cat.png", "dog.mp4"]
    assert rendered.clips == ["clip of cat.png", "dog.mp4 at 0", "dog.mp4 at 2", "dog.mp4 at 4"]
    assert rendered.tokens.count(BYTE_SPECIAL["<|media_pad|>"]) == len(rendered.clips)
    assert not any(rendered.weights)


def test_media_that_the_assistant_shows_has_no_weight():
    content = [{"type": "text", "text": "so"}, {"type": "video", "video": "v"}, {"type": "text", "text": "!"}]
    rendered = render([{"role": "assistant", "content": content}], TOKENIZER, load_media)
    taught = [token for token, weight in zip(rendered.tokens, rendered.weights, strict=True) if weight]
    assert taught == ids("so!«<|im_end|>»")


def test_neighbouring_texts_are_encoded_as_one(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [b"ab"]
    lines = (base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(tokens))
    (tmp_path / "tiktoken.model").write_text("".join(lines))
    tokenizer = load_tokenizer(str(tmp_path))
    split = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    one = render([{"role": "user", "content": "ab"}], tokenizer)
    assert 256 in one.tokens
    assert render([{"role": "user", "content": split}], tokenizer).tokens == one.tokens


@pytest.mark.parametrize("name", sorted(BYTE_SPECIAL))
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_text_cannot_inject_special_tokens(role, name):
    attack = f"x{name}y"
    for content in (attack, [{"type": "text", "text": attack}]):
        rendered = render([{"role": role, "content": content}], TOKENIZER)
        allowed = role == "assistant" and name in ("<think>", "</think>")
        assert rendered.tokens == ids(turn(role, f"x«{name}»y" if allowed else attack))


def test_pieces_of_a_special_token_do_not_join():
    content = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    for role in ("user", "assistant"):
        tokens = render([{"role": role, "content": content}], TOKENIZER).tokens
        assert tokens.count(BYTE_SPECIAL["<|im_end|>"]) == 1  # that of the template


def test_arrays_and_bytes_are_sources():
    for source in (np.zeros((4, 4, 3), np.uint8), b"png"):
        messages = [{"role": "user", "content": [{"type": "image", "image": source}]}]
        assert render(messages, TOKENIZER, lambda part: [(None, "clip")]).media[0] is source


GOOD = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "bad, where",
    [
        ("hi", r"messages\[1\] must be a mapping"),
        ({"content": "x"}, r"messages\[1\]\.role"),
        ({"role": "critic", "content": "x"}, r"messages\[1\]\.role.*'critic'"),
        ({"role": ["user"], "content": "x"}, r"messages\[1\]\.role"),
        ({"role": "user"}, r"messages\[1\]\.content is missing"),
        ({"role": "user", "content": None}, r"messages\[1\]\.content is missing"),
        ({"role": "user", "content": 7}, r"messages\[1\]\.content must be a string"),
        ({"role": "user", "content": {"text": "x"}}, r"messages\[1\]\.content must be a string"),
        ({"role": "user", "content": ["x"]}, r"messages\[1\]\.content\[0\] must be a mapping"),
        ({"role": "user", "content": [{"type": "audio", "audio": "x"}]}, r"messages\[1\]\.content\[0\]\.type"),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[1\]\.content\[0\]: .* 'text'"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, r"messages\[1\]\.content\[0\]\.text"),
        ({"role": "user", "content": [{"type": "image", "image": 3}]}, r"messages\[1\]\.content\[0\]\.image"),
        ({"role": "user", "content": [{"type": "image", "video": "x"}]}, r"messages\[1\]\.content\[0\]"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "image": "y"}]}, r"messages\[1\]\.content\[0\]"),
        ({"role": "user", "content": [{}]}, r"messages\[1\]\.content\[0\]\.type"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, r"messages\[1\]\.tool_calls"),
    ],
)
def test_bad_messages_are_named(bad, where):
    with pytest.raises(ChatError, match=where):
        render([GOOD, bad], TOKENIZER, load_media)


@pytest.mark.parametrize("messages", ["hi", b"hi", [], None, {"role": "user"}, 5])
def test_bad_lists_of_messages(messages):
    with pytest.raises(ChatError, match="messages must be a list"):
        render(messages, TOKENIZER)


def test_media_without_a_loader_is_refused():
    with pytest.raises(ChatError, match=r"messages\[0\]\.content\[0\]: image cannot be read here"):
        render([{"role": "user", "content": [{"type": "image", "image": "x"}]}], TOKENIZER)

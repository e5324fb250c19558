"""A vocabulary that is not tiktoken.model is read, or named with its remedy: never bytes in silence."""

import dataclasses
import json
import logging
import os
import random
import shutil

import pytest
import transformers

from benchmarks.serving import minute_model
from k25_jax.checkpoint.folders import BASE
from k25_jax.checkpoint.load import load_model
from k25_jax.cli import main
from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.pipeline import Preparer
from k25_jax.sampling.prompt import MediaReader, from_messages
from k25_jax.serving.errors import ApiError
from k25_jax.serving.requests import chat_ask, completion_ask
from k25_jax.text.chat import ChatError
from k25_jax.text.tokenizer import BYTE_SPECIAL, PUBLIC_SPECIAL, TokenizerError, load_tokenizer, no_vocabulary
from k25_jax.text.tokenizer_json import byte_level_files

tokenizers = pytest.importorskip("tokenizers")
CORPUS = ["the thing is in the ring", "中文字 中文", "def f(x):\n    return x  # 00 000", "it's camelCase"] * 9
TEXTS = [*CORPUS[:4], "", " ", "a\r\n\tb", "é🙂\u0301", "<|im_end|>", "x<think>y</think>", "[BOS]z", "\ud800a"]
HI = [{"role": "user", "content": "hi"}]


def write_json(folder, special=tuple(BYTE_SPECIAL), change=None, normalizer=None):
    """A tokenizer.json of byte pairs, trained here, with special tokens behind them; `change` edits it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(special))
    contents = json.loads(tokenizer.to_str())
    if change:
        change(contents)
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    return folder


@pytest.fixture
def k25(capsys):
    """Runs the command: (status, stdout, stderr)."""

    def run(*argv: str):
        status = main(list(argv))
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(BASE, tmp_path / "base")


# ---------------------------------------------------------------------------------------------------- tokenizer.json
@pytest.mark.parametrize("normalizer", [None, "NFC"])
def test_ids_are_those_of_the_library_but_text_never_becomes_special(tmp_path, normalizer):
    write_json(tmp_path, normalizer=normalizer and tokenizers.normalizers.NFC())
    ours, theirs = load_tokenizer(str(tmp_path)), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.vocab_size == theirs.get_vocab_size() and ours.special["<|im_end|>"] == theirs.token_to_id("<|im_end|>")
    special = set(ours.special.values())
    for text in TEXTS:
        whole = text.encode("utf-8", "replace").decode().replace("?", "\ufffd") if "\ud800" in text else text
        ids = ours.encode(text)
        assert not special & set(ids) and ours.decode(ids) == whole
        assert ours.encode(text, allow_special=True) == theirs.encode(whole, add_special_tokens=False).ids
    assert any(len(ours.encode(text)) < len(text.encode()) for text in CORPUS)  # pairs were merged


def test_random_text_comes_back(tmp_path):
    tokenizer, generator = load_tokenizer(str(write_json(tmp_path))), random.Random(0)
    for length in (1, 3, 40, 300):
        text = "".join(
            chr(generator.choice([generator.randrange(128), generator.randrange(0xD800)])) for _ in range(length)
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_that_are_words_are_always_read(tmp_path):
    """Some vocabularies have runs of spaces among their added tokens, called ordinary; markers stay special."""

    def change(contents):
        first = 1 + max(token["id"] for token in contents["added_tokens"])
        flags = dict(contents["added_tokens"][0], special=False)
        contents["added_tokens"] += [
            flags | {"id": first, "content": "      "},
            flags | {"id": first + 1, "content": "<x>"},
        ]

    tokenizer = load_tokenizer(str(write_json(tmp_path, change=change)))
    ids = tokenizer.encode("a      b<x>")
    assert tokenizer.decode(ids) == "a      b<x>" and tokenizer.special["<x>"] not in ids
    assert tokenizer.special["<x>"] - 1 in ids and "      " not in tokenizer.special


def test_kimis_own_ids_are_filled_in_for_its_vocabulary_alone(tmp_path):
    """Where the file has other tokens in reserve at these ids, or none; not in another family's vocabulary."""

    def change(contents):
        flags = contents["added_tokens"][0]
        named = {"<|im_end|>": 163586, "[BOS]": 163584, "<|reserved_token_163602|>": 163602}
        contents["added_tokens"] = [flags | {"id": id_, "content": name} for name, id_ in named.items()]

    tokenizer = load_tokenizer(str(write_json(tmp_path, change=change)))
    assert {name: tokenizer.special[name] for name in PUBLIC_SPECIAL} == PUBLIC_SPECIAL
    assert "<|reserved_token_163602|>" not in tokenizer.special
    other = load_tokenizer(str(write_json(tmp_path, special=["<|im_end|>"])), required=())
    assert set(other.special) == {"<|im_end|>"}


def test_special_tokens_may_stand_in_the_configuration(tmp_path):
    write_json(tmp_path, special=[])
    decoder = {str(300 + i): {"content": name} for i, name in enumerate(BYTE_SPECIAL)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert load_tokenizer(str(tmp_path)).special["[BOS]"] == 300


def test_a_public_model_with_it_is_used_with_its_ids(base, tmp_path):
    files = byte_level_files()
    files["tokenizer.json"]["model"] |= {"merges": [["h", "i"]]}
    files["tokenizer.json"]["model"]["vocab"] |= {"hi": 280}
    for name, contents in files.items():
        (base / name).write_text(json.dumps(contents))
    model = load_model(base)
    assert model.tokenizer.encode("hi hi!") == [280, 32, 280, 33]
    assert from_messages(HI, model.tokenizer, MediaReader(model.config)).tokens.count(280) == 1


def test_a_vocabulary_larger_than_the_models_is_another_models(base):
    write_json(base, change=lambda contents: contents["model"]["vocab"].update({"zzzz": 5000}))
    with pytest.raises(TokenizerError, match="tokenizer.json has ids up to 5000, the model a vocabulary of 288"):
        load_model(base)


# --------------------------------------------------------------------------------------------------------- not read
def without_bytes(contents):
    contents["model"]["vocab"].pop("a")
    contents["model"]["merges"] = [pair for pair in contents["model"]["merges"] if "a" not in "".join(pair)]
    contents["model"]["vocab"] = {
        token: i for i, token in enumerate(t for t in contents["model"]["vocab"] if "a" not in t)
    }


BROKEN = {
    "nothing": "", "no object": "[]", "an empty object": "{}", "nested": "[" * 5000, "two fields": '{"model":1,"model":2}',
    "words": '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}',
    "a sentence piece": '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}',
    "pairs that are not of bytes": '{"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": {"type": "Metaspace"}}',
    "a model that is a list": '{"model": []}',
}  # fmt: skip
CHANGED = {
    "bytes left out": without_bytes,
    "a byte fallback": lambda c: c["model"].update(byte_fallback=True),
    "words that end": lambda c: c["model"].update(end_of_word_suffix="</w>"),
    "a vocabulary that is a list": lambda c: c["model"].update(vocab=["a"]),
    "an id that is none": lambda c: c["model"]["vocab"].update(a=-1),
    "an id that is a text": lambda c: c["model"]["vocab"].update(a="1"),
    "an id twice": lambda c: c["model"]["vocab"].update(a=c["model"]["vocab"]["b"]),
    "merges of strangers": lambda c: c["model"].update(merges=[["qq", "zz"]]),
    "merges that are numbers": lambda c: c["model"].update(merges=[1]),
    "a pre-tokenizer that is unknown": lambda c: c.update(pre_tokenizer={"type": "X"}),
    "an added token without id": lambda c: c["added_tokens"][0].pop("id"),
    "an added token twice": lambda c: c["added_tokens"].append(c["added_tokens"][0]),
    "added tokens that are a text": lambda c: c.update(added_tokens="x"),
    "no special tokens": lambda c: c.update(added_tokens=[]),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BROKEN, *CHANGED])
def test_a_tokenizer_json_that_cannot_be_used_is_named(tmp_path, name):
    if name in BROKEN:
        (tmp_path / "tokenizer.json").write_text(BROKEN[name])
    else:
        write_json(tmp_path, change=CHANGED[name])
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(str(tmp_path))
    line = str(error.value)
    assert "\n" not in line and line.startswith(str(tmp_path / "tokenizer.json")) and len(line) < 800, line


OTHERS = ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt", "VOCAB.TXT",
          "qwen.tiktoken", "Tokenizer.Model", "tekken.json"]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_vocabularies_are_named_with_the_remedy(base, name):
    (base / name).write_text("x")
    for read in (lambda: load_tokenizer(str(base)), lambda: load_model(base)):
        with pytest.raises(TokenizerError, match=f"{base / name} is .*which is not read: put .*tiktoken.model"):
            read()


@pytest.mark.parametrize("name", ["tokenizer.json", "tiktoken.model"])
def test_a_pipe_or_folder_in_its_place(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(TokenizerError, match=f"{name} is a pipe"):
        load_tokenizer(str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(TokenizerError, match=f"{name} is a folder"):
        load_tokenizer(str(tmp_path))


def test_every_command_says_the_same_and_reads_no_weights(k25, base, tmp_path):
    (base / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    for file in base.glob("*.safetensors"):
        file.unlink()
    for command in (["generate", "--raw", "--prompt=hi"], ["generate", "--prompt=hi"], ["chat"], ["serve", "--port=0"]):
        status, out, err = k25(command[0], f"--checkpoint={base}", *command[1:])
        *before, line = err.splitlines()
        assert (status, out) == (2, "") and [text[:9] for text in before] in ([], ["listening"]), err
        assert f"{base / 'tokenizer.json'} holds a vocabulary of kind 'Unigram'" in line and "tiktoken.model" in line
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path)),), tokenizer=str(base))
    with pytest.raises(TokenizerError, match="tokenizer.json holds a vocabulary of kind"):
        Preparer(load_tokenizer(data.tokenizer), data, preset("tiny"))


def test_a_vocabulary_without_the_templates_tokens_reads_raw_text_alone(base):
    write_json(base, special=["<s>"])
    model = load_model(base)
    assert model.tokenizer.encode("the") and model.tokenizer.encode("<s>", allow_special=True) == [280]
    with pytest.raises(ChatError, match=r"tokenizer.json has no <\|im_user\|>, which Kimi's chat template needs: put"):
        from_messages(HI, model.tokenizer, MediaReader(model.config))
    with pytest.raises(TokenizerError, match=r"tokenizer.json: no id for \[BOS\], "):
        load_tokenizer(str(base))  # as training and the preparation of data do


@pytest.mark.parametrize("special", [(), ("<s>",)])
def test_the_server_answers_400_where_a_vocabulary_cannot_take_the_request(tmp_path, special):
    """No vocabulary at all, and one without the tokens of the chat template."""
    tokenizer = load_tokenizer(str(write_json(tmp_path, special)), required=()) if special else no_vocabulary(tmp_path)
    served, body = dataclasses.replace(minute_model(), tokenizer=tokenizer), {"model": "minute", "max_tokens": 1}
    with pytest.raises(ApiError, match=f"{tmp_path}.* has no .*im_user.*: put the model's own tiktoken.model"):
        chat_ask(json.dumps(body | {"messages": HI}).encode(), served)
    (request,) = completion_ask(json.dumps(body | {"prompt": [1, 2]}).encode(), served).requests
    assert request.tokens == [1, 2]
    if not special:
        with pytest.raises(ApiError, match=f"prompt: {tmp_path} holds no vocabulary to read text with: put"):
            completion_ask(json.dumps(body | {"prompt": "hi"}).encode(), served)


# ------------------------------------------------------------------------------------------------------- none at all
def test_the_model_that_comes_with_the_package_is_of_bytes_without_a_word(base, caplog):
    with caplog.at_level(logging.INFO):
        for folder in ("base", base):
            assert load_model(folder).tokenizer.encode("é") == [0xC3, 0xA9]
    assert not caplog.records


def test_another_model_without_a_vocabulary_takes_ids_alone(base, caplog):
    contents = json.loads((base / "config.json").read_text())
    contents |= {"media_placeholder_token_id": 200, "image_token_id": 200}
    (base / "config.json").write_text(json.dumps(contents))
    model = load_model(base)
    assert "holds no vocabulary: only token ids" in caplog.text
    assert model.tokenizer.decode([1, 2]) == "\ufffd\ufffd"
    for read in (
        lambda: model.tokenizer.encode("hi"),
        lambda: from_messages(HI, model.tokenizer, MediaReader(model.config)),
    ):
        with pytest.raises(
            (TokenizerError, ChatError), match=f"{base} h(olds|as) no .*: put the model's own tiktoken.model"
        ):
            read()


# -------------------------------------------------------------------------------------------------- byte-level models
def test_transformers_reads_a_converted_byte_level_model(k25, tmp_path):
    status, _, err = k25("convert", "--checkpoint=base", f"--output={tmp_path / 'out'}")
    assert status == 0, err
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer()
    for text in [text for text in TEXTS if "\ud800" not in text] + ["".join(map(chr, range(0x300)))]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text, allow_special=True) and theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (256, 258, 276)
    assert theirs.decode([97, 258], skip_special_tokens=True) == "a" and len(theirs) == ours.vocab_size
    again = load_tokenizer(str(tmp_path / "out"))
    assert again.special == ours.special and again.encode("a <think> é") == ours.encode("a <think> é")

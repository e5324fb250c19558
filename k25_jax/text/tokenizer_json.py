"""tokenizer.json, the vocabulary format of the library `tokenizers`: byte-level byte-pair ones are read (K2.5 §3.1).

A byte-level vocabulary writes each byte as one printable character. Byte-level models of ours are written in this
format, so that other software reads them; for these the library is not needed.
"""

import functools
import json
import re
from collections.abc import Iterator

from k25_jax.config.json_file import read_object, shown
from k25_jax.runtime.paths import AnyPath
from k25_jax.text.tokenizer import (
    BYTE_SPECIAL,
    MOST_BYTES,
    PUBLIC_SPECIAL,
    REMEDY,
    Tokenizer,
    TokenizerError,
    encode_bytes,
    is_name,
)

MARKER = re.compile(r"<.*>|\[.*\]")  # what an added token that is not called special must look like to be one here
RESERVED = re.compile(r"<\|reserved_(special_)?token_\d+\|>")
SHOWN = ("<think>", "</think>")  # markers that other software shows in an answer


def load_json(path: AnyPath, configured: list[tuple[str, int]]) -> Tokenizer:
    """The vocabulary in a tokenizer.json; `configured` are special tokens that its folder names besides.

    Raises TokenizerError for a vocabulary of another kind, ValueError for a file that is not JSON.
    """
    contents = read_object(path, MOST_BYTES)
    _check_kind(path, contents)
    vocabulary = _ids(path, contents["model"].get("vocab"), "model.vocab")
    added = _added(path, contents.get("added_tokens"))
    special = {token["content"]: token["id"] for token in added if token["special"]}
    token_bytes = {id_: _bytes(token) for token, id_ in vocabulary.items() if token not in special}
    token_bytes |= {token["id"]: token["content"].encode() for token in added if not token["special"]}
    present = {text for text in token_bytes.values() if len(text) == 1}
    if len(present) < 256:
        raise TokenizerError(f"{path}: {256 - len(present)} of 256 bytes have no token in model.vocab; fetch it again")
    special = _completed(special, token_bytes, configured)
    bytes_alone = not contents["model"].get("merges") and vocabulary.items() >= byte_vocabulary().items()
    ordinary = encode_bytes if bytes_alone and len(token_bytes) == 256 else _library(path, contents, added)
    return Tokenizer(special, token_bytes, ordinary, str(path))


def _check_kind(path: AnyPath, contents: dict):
    """Raise TokenizerError unless the file holds a byte-level byte-pair vocabulary."""
    model = contents.get("model")
    if not isinstance(model, dict):
        raise TokenizerError(f"{path} has no model: it is not a tokenizer.json; {REMEDY}")
    kind = model.get("type", "BPE" if "merges" in model else None)
    steps = {*_kinds(contents.get("pre_tokenizer")), *_kinds(contents.get("decoder"))}
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(name)]
    if kind != "BPE" or "ByteLevel" not in steps or odd:
        detail = f" with {', '.join(odd)}" if odd else "" if kind != "BPE" else ", but not of bytes"
        raise TokenizerError(f"{path} holds a vocabulary of kind {shown(kind)}{detail}, which is not read: {REMEDY}")


def _kinds(step) -> Iterator[str]:
    """The kinds of a pre-tokenizer or decoder, and of those it is made of."""
    if isinstance(step, dict):
        yield str(step.get("type"))
        for name in ("pretokenizers", "decoders"):
            inner = step.get(name)
            for part in inner if isinstance(inner, list) else []:
                yield from _kinds(part)


def _ids(path: AnyPath, table, where: str) -> dict[str, int]:
    if not isinstance(table, dict) or not all(_is_id(id_) for id_ in table.values()):
        raise TokenizerError(f"{path}: {where} must map tokens to ids; fetch the file again")
    if len(set(table.values())) < len(table):
        raise TokenizerError(f"{path}: {where} gives one id to two tokens; fetch the file again")
    return table


def _is_id(value) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _added(path: AnyPath, tokens) -> list[dict]:
    """The added tokens; `special` says which of them text may not become unless that is allowed."""
    added = []
    for token in [] if tokens is None else tokens if isinstance(tokens, list) else [tokens]:
        name, id_ = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not is_name(name) or not _is_id(id_):
            raise TokenizerError(f"{path}: added_tokens: {shown(token)} needs content and an id; fetch the file again")
        added.append(token | {"special": bool(token.get("special")) or bool(MARKER.fullmatch(name))})
    for key in ("content", "id"):
        if len({token[key] for token in added}) < len(added):
            raise TokenizerError(f"{path}: added_tokens has the same {key} twice; fetch the file again")
    return added


def _completed(special: dict[str, int], token_bytes: dict[int, bytes], configured: list) -> dict[str, int]:
    """With the folder's other special tokens, and for Kimi's vocabulary those of the public table that are left out.

    They take ids that are free, or of tokens in reserve.
    """
    named = list(configured)
    if PUBLIC_SPECIAL["<|im_end|>"] in (special.get("<|im_end|>"), dict(configured).get("<|im_end|>")):
        named += PUBLIC_SPECIAL.items()
    names = {id_: name for name, id_ in special.items()}
    for name, id_ in named:
        holder = names.get(id_, "")
        if name not in special and id_ not in token_bytes and (not holder or RESERVED.fullmatch(holder)):
            special.pop(holder, None)
            special[name], names[id_] = id_, name
    return special


def _library(path: AnyPath, contents: dict, added: list[dict]):
    """The encoder of ordinary text of the library `tokenizers`: no added token that is special comes out of it."""
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(f"{path} is read by the library tokenizers: pip install tokenizers") from error
    kept = {name: part for name, part in contents.items() if name not in ("truncation", "padding", "post_processor")}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(kept | {"added_tokens": added}))
    except Exception as error:  # the library raises no class of its own
        raise TokenizerError(f"{path} cannot be read ({shown(str(error))}); fetch the file again") from error
    backend.encode_special_tokens = True

    def ordinary(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    return ordinary


# --------------------------------------------------------------------------------------------------------------- bytes
@functools.cache
def byte_vocabulary() -> dict[str, int]:
    """The character that stands for each byte -> that byte: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for; one that has other characters stands for itself."""
    table = byte_vocabulary()
    return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode("utf-8", "replace")


def byte_level_files() -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json of the byte-level vocabulary, for software that reads these."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [{"id": id_, "content": name, **flags, "special": name not in SHOWN} for name, id_ in BYTE_SPECIAL.items()]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": dict(byte_vocabulary()), "merges": []}
    vocabulary = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    vocabulary |= {"pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}
    names = {"bos_token": "[BOS]", "eos_token": "<|im_end|>", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    decoder = {str(token["id"]): {name: token[name] for name in token if name != "id"} for token in added}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": vocabulary, "tokenizer_config.json": settings | names | {"added_tokens_decoder": decoder}}

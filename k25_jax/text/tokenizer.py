"""Text to token ids and back: a model's byte-pair vocabulary, or plain bytes for small models (K2.5 §3.1).

Text that merely looks like a special token is ordinary text unless the caller allows it. So nothing that a user or a
file says can open a turn, close one, or stand for an image.
"""

import base64
import binascii
import codecs
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import tiktoken

from k25_jax.config.json_file import read_object, require_file, shown
from k25_jax.runtime.paths import AnyPath, names, read_range, size_and_time, to_path

PUBLIC_SPECIAL = {
    "[BOS]": 163584,
    "[EOS]": 163585,
    "<|im_end|>": 163586,
    "<|im_user|>": 163587,
    "<|im_assistant|>": 163588,
    "[EOT]": 163593,
    "<|im_system|>": 163594,
    "<|tool_calls_section_begin|>": 163595,
    "<|tool_calls_section_end|>": 163596,
    "<|tool_call_begin|>": 163597,
    "<|tool_call_argument_begin|>": 163598,
    "<|tool_call_end|>": 163599,
    "<|im_middle|>": 163601,
    "<|media_begin|>": 163602,
    "<|media_content|>": 163603,
    "<|media_end|>": 163604,
    "<|media_pad|>": 163605,
    "<think>": 163606,
    "</think>": 163607,
    "[UNK]": 163838,
    "[PAD]": 163839,
}
BYTE_SPECIAL = {
    "[BOS]": 256,
    "[EOS]": 257,
    "<|im_end|>": 258,
    "<|im_user|>": 259,
    "<|im_assistant|>": 260,
    "<|media_begin|>": 261,
    "<|media_content|>": 262,
    "<|media_end|>": 263,
    "<|media_pad|>": 264,
    "<|im_system|>": 265,
    "<|im_middle|>": 266,
    "<think>": 267,
    "</think>": 268,
    "<|tool_calls_section_begin|>": 269,
    "<|tool_calls_section_end|>": 270,
    "<|tool_call_begin|>": 271,
    "<|tool_call_argument_begin|>": 272,
    "<|tool_call_end|>": 273,
    "[EOT]": 274,
    "[UNK]": 275,
    "[PAD]": 276,
}
REQUIRED = (
    *("[BOS]", "[EOS]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    *("<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>"),
)
VOCABULARIES = ("tiktoken.model", "tokenizer.json")  # that are read: the first that is there
OTHERS = {  # files of vocabularies that are not, and what they are
    "vocab.json": "half of a byte-pair vocabulary",
    "merges.txt": "half of a byte-pair vocabulary",
    "vocab.bpe": "half of a byte-pair vocabulary",
    "encoder.json": "half of a byte-pair vocabulary",
    "vocab.txt": "a WordPiece vocabulary",
    "tekken.json": "a Tekken vocabulary",
    ".model": "a SentencePiece vocabulary",
    ".spm": "a SentencePiece vocabulary",
    ".tiktoken": "a tiktoken vocabulary of another model",
}
MOST_BYTES = 100_000_000  # of a vocabulary
REMEDY = "put the model's own tiktoken.model there, or a byte-level tokenizer.json with Kimi's special tokens"
RESERVED = 256  # ids after the ranks that are special, named or not

# How Kimi cuts text before merging bytes: Han runs by themselves; words (capitals, then small letters) with one leading
# mark and an English contraction; up to three digits; marks; line ends; other spaces.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_LEAD}{_UPPER}*{_LOWER}+{_SHORT}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_SHORT}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
MAX_CHARS = 400_000  # tiktoken's regex engine fails on longer strings,
MAX_RUN = 25_000  # and on longer runs of only spaces or of none
_RUN = re.compile(r"\s+|\S+")


class TokenizerError(ValueError):
    """A vocabulary that cannot be used; the message names the file, the line or field, and the remedy."""


class SpecialTokens(dict):
    """Name -> id; a name that is not there is a TokenizerError that begins with `source`."""

    def __init__(self, special: Mapping[str, int], source: str):
        super().__init__(special)
        self.source = source

    def __missing__(self, name: str):
        raise TokenizerError(self.lack(name))

    def lack(self, name: str) -> str:
        """What to say of a name that is not there."""
        return f"{self.source} has no {name}, which Kimi's chat template needs: {REMEDY}"


class Tokenizer:
    """Special tokens around an encoder of ordinary text. `token_bytes[id]` is what an ordinary token stands for."""

    def __init__(self, special: Mapping[str, int], token_bytes: Mapping[int, bytes], ordinary: Callable, source: str):
        self.special = SpecialTokens(special, source)
        self.ordinary_size = 1 + max(token_bytes, default=-1)
        self.vocab_size = max(self.ordinary_size, 1 + max(self.special.values(), default=-1))
        self._special_ids = frozenset(self.special.values())
        self._bytes = dict(token_bytes) | {id_: name.encode() for name, id_ in self.special.items()}
        self._ordinary = ordinary

    def encode(self, text: str, allow_special: bool | Collection[str] = False) -> list[int]:
        """Token ids. `allow_special`: True, or the names that may become special tokens; others stay ordinary text."""
        text = _whole_characters(text)
        names = self.special if allow_special is True else (allow_special or ())
        if not names:
            return self._ordinary(text)
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        ids = []
        for part in re.split(f"({pattern})", text):
            ids += [self.special[part]] if part in names else self._ordinary(part)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text; never raises: an unknown id or a byte that is not UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes_of(id_, skip_special) for id_ in ids).decode("utf-8", "replace")

    def bytes_of(self, id_: int, skip_special: bool = False) -> bytes:
        """The bytes that one token stands for."""
        id_ = int(id_)
        if skip_special and id_ in self._special_ids:
            return b""
        return self._bytes.get(id_, "\ufffd".encode())


class StreamDecoder:
    """Decodes token by token: holds back the bytes of a character until it is whole. All pushes + flush == `decode`."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id_: int) -> str:
        """The characters that this token completes."""
        return self._utf8.decode(self._tokenizer.bytes_of(id_, self._skip_special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a broken character, or nothing."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(directory: str = "", required: Collection[str] = REQUIRED) -> Tokenizer:
    """The vocabulary in `directory`: tiktoken.model, else a byte-level tokenizer.json; '' gives bytes.

    Special tokens come from the files there; the public table fills the ids that Kimi's leave free. `required` must be
    among them. Raises TokenizerError that names the file.
    """
    if not directory:
        return Tokenizer(BYTE_SPECIAL, {i: bytes([i]) for i in range(256)}, encode_bytes, "the byte-level vocabulary")
    path = find_vocabulary(directory)
    if path is None:
        raise TokenizerError(f"{directory} holds no vocabulary: {REMEDY}; '' stands for bytes")
    try:
        require_file(path)
        tokenizer = _load_tiktoken(path) if path.name == VOCABULARIES[0] else _load_json(path)
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror or error}") from error
    except TokenizerError:
        raise
    except ValueError as error:  # of read_object, which names the file
        raise TokenizerError(f"{error}; {REMEDY}") from error
    missing = [name for name in required if name not in tokenizer.special]
    if missing:
        raise TokenizerError(f"{tokenizer.special.source}: no id for {', '.join(missing)}; {REMEDY}")
    return tokenizer


def find_vocabulary(directory: str | AnyPath) -> AnyPath | None:
    """The vocabulary in a folder, or None; TokenizerError where there is only one that is not read."""
    folder = to_path(directory, "data.tokenizer")
    if not folder.is_dir():
        raise TokenizerError(
            f"{directory}: no such directory; give one with {' or '.join(VOCABULARIES)}, or '' for bytes"
        )
    for name in VOCABULARIES:
        if (folder / name).exists():
            return folder / name
    for path in (folder / name for name in names(folder)):
        kind = OTHERS.get(path.name.lower()) or OTHERS.get(path.suffix.lower())
        if kind:
            raise TokenizerError(f"{path} is {kind}, which is not read: {REMEDY}")
    return None


def no_vocabulary(directory: str | AnyPath) -> Tokenizer:
    """For a model without one: ids come out as U+FFFD, and text or a special token going in is a TokenizerError."""

    def refuse(text: str):
        raise TokenizerError(f"{directory} holds no vocabulary to read text with: {REMEDY}")

    return Tokenizer({}, {}, refuse, str(directory))


def _load_json(path: AnyPath) -> Tokenizer:
    from k25_jax.text.tokenizer_json import load_json

    return load_json(path, configured(path.with_name("tokenizer_config.json")))


def encode_bytes(text: str) -> list[int]:
    """The bytes of a text: they are the ids."""
    return list(text.encode())


def _load_tiktoken(path: AnyPath) -> Tokenizer:
    ranks = _read_ranks(path)
    special = _read_special(path.parent / "tokenizer_config.json", ranks)
    encoding = tiktoken.Encoding(path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def ordinary(text: str) -> list[int]:
        return [id_ for piece in pieces(text) for id_ in encoding.encode_ordinary(piece)]

    source = path.with_name("tokenizer_config.json")  # where what is missing is to be added
    return Tokenizer(special, {rank: token for token, rank in ranks.items()}, ordinary, str(source))


def _read_ranks(path: AnyPath) -> dict[bytes, int]:
    """Token bytes -> rank, from lines of base64 and a decimal rank."""
    ranks, seen = {}, set()
    size, _ = size_and_time(path)
    if size > MOST_BYTES:
        raise TokenizerError(f"{path} is larger than {MOST_BYTES:,} bytes: it is no vocabulary; fetch the file again")
    for number, line in enumerate(read_range(path, size, 0).splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank_text = line.split()
            token, rank = base64.b64decode(text, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise TokenizerError(f"{path}:{number}: not 'base64 rank' ({line[:40]!r}); fetch the file again") from None
        if not token or rank < 0 or token in ranks or rank in seen:
            raise TokenizerError(f"{path}:{number}: empty, negative or repeated ({line[:40]!r}); fetch the file again")
        ranks[token] = rank
        seen.add(rank)
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{path}: byte {missing[0]:#04x} has no token ({len(missing)} of 256 are missing); fetch the file again"
        )
    return ranks


def _read_special(path: AnyPath, ranks: Mapping[bytes, int]) -> dict[str, int]:
    """Special tokens: those of `tokenizer_config.json`, the public ones where they are free, and reserved names."""
    special, taken = {}, set(ranks.values())
    for name, id_ in configured(path):
        if name in special or id_ in taken:
            raise TokenizerError(f"{path}: added_tokens_decoder[{id_}] = {name!r} is taken already; correct the file")
        special[name] = id_
        taken.add(id_)
    for name, id_ in PUBLIC_SPECIAL.items():
        if name not in special and id_ not in taken:
            special[name] = id_
            taken.add(id_)
    reserved = (id_ for id_ in range(len(ranks), len(ranks) + RESERVED) if id_ not in taken)
    return special | {f"<|reserved_token_{id_}|>": id_ for id_ in reserved}


def configured(path: AnyPath) -> list[tuple[str, int]]:
    """The special tokens of a tokenizer_config.json; none where there is no such file."""
    if not path.exists():
        return []
    try:
        table = read_object(path, MOST_BYTES).get("added_tokens_decoder")
    except ValueError as problem:
        raise TokenizerError(f"{problem}; fetch the file again") from None
    try:
        pairs = [(entry["content"], int(id_)) for id_, entry in (table or {}).items()]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise TokenizerError(
            f"{path}: added_tokens_decoder must map ids to {{'content': name}} ({type(problem).__name__}: {problem})"
        ) from None
    for name, id_ in pairs:
        if not is_name(name) or not 0 <= id_ < 2**31:
            raise TokenizerError(f"{path}: added_tokens_decoder[{id_}]: {shown(name)} cannot be a special token")
    return pairs


def is_name(name) -> bool:
    """Whether a token can be called this: text that has a UTF-8 form."""
    return isinstance(name, str) and bool(name) and not any("\ud800" <= character <= "\udfff" for character in name)


def pieces(text: str) -> Iterator[str]:
    """Cut text that is too long for tiktoken, just where Kimi's own tokenizer cuts it; they join to `text`."""
    for begin in range(0, len(text), MAX_CHARS):
        window, start = text[begin : begin + MAX_CHARS], 0
        runs = _RUN.finditer(window) if len(window) > MAX_RUN else ()
        for run in runs:
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield window[start:cut]
                start = cut
        yield window[start:]


def _whole_characters(text: str) -> str:
    """Join surrogate pairs, and replace lone surrogates, which have no UTF-8 form, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

"""The letter of an option in what a model wrote, in the forms that public scorers read (K2.5 §4).

CUES has what announces a letter; the last letter announced counts. FORMS has, in their order, the other ways to state one.
"A" and "I" are words, too: they are letters only where no word could stand. Nothing here raises, or takes long.
"""

import re
from collections.abc import Iterator

from k25_jax.scoring.statements import ANSWER_IS, ascii_forms

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NONE = -1  # a letter was stated, but not one of the options, or more than one: "A or B"

# ------------------------------------------------------------------------------------------------- the text without marks
_FOREIGN = dict(zip("أبجدঅবডঢАВСЕ", "ABCDABCDABCE", strict=True))  # those of simple-evals, and Cyrillic look-alikes
_CLEAN = (
    (re.compile(r"\\(?:boxed|fbox)\s{0,3}\{"), " boxed: "),
    (re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|rm|it|sf|bb)|operatorname|emph)\b\s?\{?"), ""),
    (re.compile(r"</[^<>\n]{1,30}>|\[/[^\[\]\n]{1,30}\]"), "}\n"),
    (re.compile(r"\\[()\[\],;:! ]|\\q?quad|[${]|&nbsp;"), ""),
    (re.compile(r"(\*{1,3}|_{1,2}|[`\"'])\s?([A-Za-z])\s?\1"), r"\2}"),  # marked as a letter: no article
    (re.compile(r"[\"“”„«»「」『』【】]|\*+|`+|(?<!\w)_+|_+(?!\w)"), " "),
    (re.compile("(?<!\\w)[أبجدঅবডঢАВСЕ](?!\\w)"), lambda match: _FOREIGN[match[0]]),
    (re.compile(r"[^\S\n]+"), " "),
    (re.compile(r" ?\n ?"), "\n"),
)


def clean(text: str) -> str:
    """`text` without the marks of Markdown, TeX and tags; a closing brace stays where a letter was marked."""
    text = ascii_forms(text)
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return text.strip()


# ------------------------------------------------------------------------------------------------------------ one letter
_NOUN = r"(?:options?|choices?|letter|alternative|answer)"
_OPEN = r"[\s:=>,(\[<|'‘#\\.…→–—-]{0,12}"
_FILLER = (
    r"(?:(?:(?:therefore|thus|hence|then|indeed|clearly|definitely|certainly|probably|most likely|likely|simply|just|"
    rf"only|of course|actually|still|also|the|it is|it's|i think|i believe|number|{_NOUN})(?=[\s:,_#(\[])[\s:,_#]?"
    r"|(?:选项|選項|选|選)\s?)"
    r"\s?){0,5}"
)
_WRONG = r"(?![)}\]]?\s(?:isn't|cannot|can't|(?:is|was|are|can) (?:clearly |also )?(?:not|wrong|incorrect|false|impossible)))"
_LETTER = rf"(?<![A-Za-z0-9°])([A-Za-z])(?![A-Za-zÀ-ɏ0-9_'’°]|-\w|\s?[=+^*]|\.\w\.){_WRONG}"
_AFTER_CUE = re.compile(rf"{_OPEN}{_FILLER}{_OPEN}{_LETTER}", re.IGNORECASE)
_NEXT = r"[ })\]]{0,3}(?:[Oo]ption |[Cc]hoice |boxed: )?[(\[]?([A-Z]|[b-hj-z])(?![\w'’])"
_ALSO = re.compile(
    rf"[)\]}} ]{{0,4}}\(?(?:[/|]|,? ?\b(?:or|OR|vs\.?)\b|或) ?{_NEXT}"
    rf"|[)\]}} ]{{0,4}}(?:,? ?\b(?:and|AND)\b|[,&、]|和|与) ?{_NEXT}(?![)\]}}]? (?!and|or|are|both|only|together)[a-z])"
)
_WORDS = (
    "is|are|was|were|because|since|as|due|given|based|for|from|by|in|on|with|which|that|and|or|but|not|so|therefore|thus|"
    "hence|if|when|where|while|rather|instead|according|porque|weil|denn|parce"
)
_CLOSED = re.compile(rf" ?(?:$|\n|[)\]}}>.,;:!?/|。，；、]|[–—-] |\(|[぀-鿿가-힣]|(?:{_WORDS})\b(?!-))")  # no article
_ENDED = re.compile(r" ?(?:$|\n|[)\]}.,;!?。，、])")


def _read(found: re.Match | None, text: str, last: int, ending: re.Pattern | None) -> int | None:
    """The number of a letter that was found, NONE for one of two or for none of the options, None for a word."""
    if found is None or not found[1].isascii():  # "ı" is an I to whoever looks past case
        return None
    letter, end = found[1], found.end(1)
    if _ALSO.match(text, end):
        return NONE
    number = LETTERS.index(letter.upper())
    if (ending or letter in "AI" or letter.islower()) and not (ending or _CLOSED).match(text, end):
        return None
    return number if number <= last else NONE if _CLOSED.match(text, end) else None


# -------------------------------------------------------------------------------------------------------- after its cue
_CHOSEN = (
    r"\b(?:correct|right|best|appropriate|suitable|accurate|final|chosen|selected|most \w{1,15}) (?:\w{1,15} ){0,2}?"
    r"(?:options?|choice|alternative|response|selection|letter|one|statement)\b"
    r"(?: (?:here|among|of|for|to|in|from)\b[^.!?\n:]{0,60}?)? ?(?:[:=]|\b(?:is|would be|should be|must be)\b)"
)
_VERB = (
    r"\b(?:choose|chose|choosing|pick|select|selecting|go with|going with|opt for|vote for|settle on|i'd say|i would say)\b"
    r"|\b(?:my|our) (?:final )?(?:choice|pick|guess|vote|selection|bet) (?:is|would be)\b|(?<!不)(?:[选選]擇?择?)"
)
_HEAD = (
    r"^\W{0,4}(?:my |the )?(?:final |selected |chosen )?(?:option|choice|selection|response|solution|conclusion|result|"
    r"prediction|pick|guess|verdict|output|correct|key) ?[:=]"
)
# (what announces a letter, how it must end: None where only "A" and "I" could be words).
CUES = tuple(
    (re.compile(cue, re.IGNORECASE | re.MULTILINE), ending)
    for cue, ending in (
        (r"\bboxed: ", None),
        (r"[<\[](?:final_?)?answer[>\]]", None),
        (ANSWER_IS, None),
        (_CHOSEN, None),
        (_VERB, _CLOSED),
        (_HEAD, None),
        (r"(?<![^\W_])(?:answer|ans)\b\.?|(?:正确)?(?:答案|选项)", _ENDED),
    )
)


_TWO = re.compile(r"boxed: [A-Z][.)]?\} ?(?:or|and|[/,&])(?: or)? ?boxed: $")


def announced(text: str, options: int) -> Iterator[tuple[str, int | None]]:
    """From the last cue to the first: the rest of its line, and the letter there (None: no letter; NONE: not one)."""
    ends: dict[int, re.Pattern | None] = {}
    for cue, ending in CUES:
        for match in cue.finditer(text):
            ends.setdefault(match.end(), ending)
    for end in sorted(ends, reverse=True):
        if _TWO.search(text, max(0, end - 30), end):
            yield "", NONE
        rest = text[end:].lstrip(" :=>\n-→").split("\n", 1)[0].strip(" })")
        yield rest, _read(_AFTER_CUE.match(text, end), text, options - 1, ends[end])


# ------------------------------------------------------------------------------------------------------- without a cue
_LONE = re.compile(rf"[^\w°]{{0,8}}(?:{_NOUN}[\s:]{{1,2}})?[^\w°]{{0,8}}([A-Za-z])[^\w°+]{{0,8}}", re.IGNORECASE)
_LABEL = re.compile(
    rf"[^\w°]{{0,6}}(?:(?i:{_NOUN})[\s:]{{1,2}})?[(\[]?([A-Z](?=[)\]}}.:,]| [–—-] )|[a-z](?=[)\].]))(?!\.\w\.)"
)
_IS_RIGHT = re.compile(
    rf"(?:(?i:\b{_NOUN}) |选项|^|[\n.,;:!?]|\b(?i:so|thus|hence|therefore|that|think|believe|say|only|then) ) ?[(\[]?([A-Z])"
    r"[)\]}]? ?(?:(?:is|seems|appears|looks|must be|would be|should be)(?: to be)?(?: \w{1,12}ly| therefore| thus| indeed)?"
    r"(?: the)?(?: only| most| best)? (?:correct|right|answer|best|accurate|appropriate)\b(?!-)|(?:选?项|是)*正确)"
)
_BRACKETS = re.compile(
    r"(?:(?<![A-Za-z0-9])[(\[]|\b(?i:option|choice|letter) [(\[]?)([A-Z])(?![\w'’])"
    r"(?![)\]}]? (?:is|are|was|can|could|does|would|has)\b)"
)
_ENDING = re.compile(
    r"(?:\b(?i:(?<!so )is|be|it's|with|for|option|choice|choose|pick|select|say|only|therefore|thus|hence|so|letter|but"
    r"|actually|rather|no|yes)[,:]?"
    r"|[:=>→]) ?[(\[]?([A-Z])[)\]}.!。]{0,3}$"
)


def _lone_last(lines: list[str], text: str, last: int) -> int | None:
    """A letter alone on the last line, and not below another."""
    return _lone(lines[-1], lines[-2:-1], last)


def _lone_first(lines: list[str], text: str, last: int) -> int | None:
    """A letter alone on the first line, and not above another."""
    return _lone(lines[0], lines[1:2], last)


def _lone(line: str, beside: list[str], last: int) -> int | None:
    found = _LONE.fullmatch(line)
    return _read(found, line, last, _ENDED) if found and not any(map(_LONE.fullmatch, beside)) else None


def _is_right(lines: list[str], text: str, last: int) -> int | None:
    """ "C is correct": the last that is said to be."""
    found = [match for match in _IS_RIGHT.finditer(text) if LETTERS.index(match[1]) <= last]
    return LETTERS.index(found[-1][1]) if found else None


def _label(lines: list[str], text: str, last: int) -> int | None:
    """ "C) no car" as the last line or the first, unless it is one of a list."""
    labels = [_LABEL.match(line) for line in lines]
    names = [label[1].upper() for label in labels if label]
    for at in (-1, 0):
        if labels[at] and (len(set(names)) == 1 or (at == -1 and names.count(names[-1]) > 1)):
            return _read(labels[at], lines[at], last, None)
    return None


def _bracket(lines: list[str], text: str, last: int) -> int | None:
    """The only "(C)" or "option C" of the last line, or of the whole."""
    for where in (lines[-1], text):
        if names := {name for name in _BRACKETS.findall(where) if LETTERS.index(name) <= last}:
            return LETTERS.index(names.pop()) if len(names) == 1 else NONE
    return None


def _ending(lines: list[str], text: str, last: int) -> int | None:
    """ "It must be C." at the end of the last line."""
    return _read(_ENDING.search(lines[-1]), lines[-1], last, None)


FORMS = (_lone_last, _is_right, _ending, _lone_first, _label, _bracket)


def unannounced(text: str, options: int) -> int | None:
    """The letter by the first of FORMS that finds one; NONE where it finds several."""
    lines = [line for line in text.split("\n") if line.strip()]
    for form in FORMS if lines else ():
        if (number := form(lines, text, options - 1)) is not None:
            return number
    return None

"""What a model answered, found in what it wrote: an option, numbers, short texts; and rules that score them (K2.5 §4).

An answer is whatever a model wrote: no function here raises, or takes long, on any string.
"""

import itertools
import math
import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from k25_jax.scoring.letters import LETTERS, NONE, announced, clean, unannounced
from k25_jax.scoring.statements import MOST_TEXT, ascii_forms, boxed, final_part, spoken

__all__ = ["LETTERS", "anls", "boxed", "choice", "contains", "final_part", "number", "number_list", "plain"]
__all__ += ["same_number", "short_answer"]

MOST_CUES = 20  # places that announce an answer and are looked at, from the last
ANLS_LEAST = 0.5  # a similarity below that counts as none


# -------------------------------------------------------------------------------------------------------------- options
def choice(text: str, options: Sequence[str]) -> int | None:
    """Which of the options was chosen: by its letter, or else by its text; None when that cannot be told."""
    text = clean(spoken(text))
    longest = 2 * max(map(len, options), default=0) + 100  # characters of a line that are compared with the options
    for rest, letter in itertools.islice(announced(text, len(options)), MOST_CUES):
        rest = rest[:longest]
        if (number := _begins(rest, options)) is not None:  # "Answer: E. coli" is no choice of E
            return number
        if letter not in (None, NONE):
            return letter
        if (number := _same(rest, options)) is not None:
            return number
        if letter == NONE:
            return None
    lines = [line for line in text.split("\n") if line.strip()]
    for line in (lines[-1], lines[0]) if lines else ():
        if (number := _begins(line, options, whole=True)) is not None:
            return number
    if (letter := unannounced(text, len(options))) is not None:
        return None if letter == NONE else letter
    for line in (final_part(text), lines[-1], lines[0]) if lines else ():
        line = line[:longest]
        for find in (_same, _within):
            if (number := find(line, options)) is not None:
                return number
    return None


def _begins(line: str, options: Sequence[str], whole: bool = False) -> int | None:
    """The option whose text `line` begins with, as it is written; an option of one letter is none."""
    line, found = line.casefold(), []
    for number, option in enumerate(options):
        wanted = clean(option).casefold().strip(" }.")
        if len(wanted) > 1 and line.startswith(wanted):
            after = line[len(wanted) :].lstrip(" .}")
            if not after or (not whole and not re.match(r"\w|[-+*/^=]\w", line[len(wanted) :])):
                found.append((len(wanted), number))
    found.sort(reverse=True)
    alone = len(found) == 1 or (len(found) > 1 and found[0][0] > found[1][0])
    return found[0][1] if alone else None


def _same(line: str, options: Sequence[str]) -> int | None:
    """The one option that says the same as `line`, or as its first part: in words, or as a number."""
    plains = [plain(option) for option in options]
    for part in _parts(line):
        said = plain(part)
        same = [at for at, option in enumerate(plains) if said and option == said]
        if not same and (value := number(part)) is not None:
            same = [
                at for at, option in enumerate(options) if (own := number(option)) is not None and _close(value, own)
            ]
        if len(same) == 1:
            return same[0]
    return None


def _within(line: str, options: Sequence[str]) -> int | None:
    """The one option whose words occur in a line that denies nothing; the longest, when it has the others in it."""
    said, plains = f" {plain(line)} ", [plain(option) for option in options]
    if len(said) > 2 * sum(map(len, plains)) + 80:
        return None
    found = [at for at, option in enumerate(plains) if len(option) > 1 and f" {option} " in said]
    longest = max(found, key=lambda at: len(plains[at]), default=None)
    if longest is None or any(f" {plains[at]} " not in f" {plains[longest]} " for at in found):
        return None
    if len([at for at in found if plains[at] == plains[longest]]) > 1:
        return None
    rest = said.replace(f" {plains[longest]} ", "  ")
    return (
        None
        if re.search(r"\b(?:not|no|never|neither|nor|without|wrong|incorrect|isn|doesn|cannot|can t)\b", rest)
        else longest
    )


# -------------------------------------------------------------------------------------------------------------- numbers
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_UNSIGNED = r"(?:\d{1,3}(?:,\d{2,3}){0,8},\d{3}|\d{1,3}(?:['’ ]\d{3}){1,8}|\d+)(?![\d'’])(?:\.\d+)?|(?<![\w.])\.\d+"
_NUMBER = re.compile(
    rf"(?<![A-Za-z\d_^.])(?:(?<![\d)]\s)(?<![\d)])[-+])?\s?(?:{_UNSIGNED})(?:[eE][-+]?\d{{1,3}}(?![\w.]))?"
)
_TEX = (
    (re.compile(r"\\[dtc]?frac\s{0,3}\{([^{}]{1,40})\}\s{0,3}\{([^{}]{1,40})\}"), r" (\1)/(\2)"),
    (re.compile(r"\\[dtc]?frac\s{0,3}(\d)\s{0,3}(\d)"), r" \1/\2"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:times|cdot)\b|[×·⋅∙]"), "*"),
    (re.compile(r"\\(?:approx|simeq|sim)\b|[≈≃≅]"), "="),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|rm|operatorname)\s{0,3}\{([^{}]{0,200})\}"), r" \1 "),
    (re.compile(r"\^\s?\{?\s?\\?circ\}?|\\degree|°"), " deg "),
    (re.compile(r"\\[,;:! ]|\\[%$]|\\[()\[\]]|[$]"), lambda match: "%" if "%" in match[0] else " "),
)
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]{1,5}")
_SUPERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWER = re.compile(
    r"(?:(?<![\w.])([-+]?[\d.]{1,20})\s?[*xX]\s?)?(?<![\w.])10\s?(?:\^|\*\*)\s?[{(]?\s?([-+]?\d{1,3})\s?[})]?"
)
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s?\^\s?[{(]?[-+]?\d{1,2}[})]?")
_FRACTION = re.compile(
    r"(?<![\w./])([-+]?)\s?(?:(\d{1,9})[ -])?[( ]{0,2}([-+]?\d{1,15})[) ]{0,2}[/⁄][( ]{0,2}([1-9]\d{0,14})[) ]{0,2}(?![\w./])"
)
_IRRATIONAL = re.compile(r"\\(?:sqrt|pi|ln|log|sin|cos|tan|infty)|[√π∞]|\^|\d\s?[*!]")
_REASON = re.compile(r"[(\[]|[,;:]\s|\.\s|\b(?:because|since|as|which|where|when|so)\b")


def number(text: str) -> float | None:
    """A number, with separators, a unit, or a sign of money or per cent around it; None when there is not just one.

    Also a fraction, a power of ten, what "=" leads to, and what comes before an explanation.
    """
    text = text[-MOST_TEXT:].strip()
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(_SUPERS), text)
    text = ascii_forms(text).replace("−", "-").replace("⁄", "/").strip()
    text = re.sub(r"(?<!\d)[–—](?=\d)", "-", re.sub(r"(?<=[A-Za-z])\.(?=\d)", ". ", text))
    for pattern, replacement in _TEX:
        text = pattern.sub(replacement, text)
    return _one_number(text)


def _one_number(text: str) -> float | None:
    """The number of a text without TeX: of the whole, of what follows "=", or of what precedes a reason."""
    if (value := _only_number(text)) is not None:
        return value
    head, equals, tail = text.rpartition("=")
    if equals and not re.search(r"\b(?:and|or)\b|[,;]\s", head + tail) and (value := _only_number(tail)) is not None:
        return value
    if (reason := _REASON.search(text, 1)) and (start := text[: reason.start()]) and any(map(str.isdigit, start)):
        return _only_number(start.rpartition("=")[2])
    return None


def _only_number(text: str) -> float | None:
    if fractions := _FRACTION.findall(text):
        sign, whole, above, below = fractions[0]
        rest = _FRACTION.sub(" ", text)
        if len(fractions) > 1 or re.search(r"\d", _UNIT_POWER.sub("", rest)) or _IRRATIONAL.search(rest):
            return None
        return (-1 if sign == "-" else 1) * (int(whole or 0) + int(above) / int(below))
    text = _UNIT_POWER.sub("", text)
    values = [
        float(factor or 1) * 10.0 ** int(power) for factor, power in _POWER.findall(text) if _is_float(factor or "1")
    ]
    text = _POWER.sub(" ", text)
    if _IRRATIONAL.search(text):
        return None
    found = [match for match in _NUMBER.findall(text) if any(map(str.isdigit, match))]
    values += [float(re.sub(r"[,'’\s]", "", match)) for match in found if _is_float(re.sub(r"[,'’\s]", "", match))]
    return values[0] if len(values) == 1 and math.isfinite(values[0]) else None


def _is_float(text: str) -> bool:
    return re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?", text) is not None


def _stated_number(said: str) -> float | None:
    """`number`, or a small one in words."""
    word = said.strip(" .!").casefold()
    return float(_WORDS.index(word)) if word in _WORDS else number(said)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def same_number(text: str, gold: float, digits: int) -> bool:
    """Whether the final part is the gold number, when both are rounded to `digits` decimals."""
    found = _stated_number(final_part(text))
    return found is not None and round(found, digits) == round(gold, digits)


def number_list(text: str) -> list[float] | None:
    """Numbers in brackets, the last that there are, or else after "answer:" with commas; None for anything else."""
    text = text[-MOST_TEXT:]
    said = final_part(text)
    bare = said != text.strip() and "," in said and re.fullmatch(r"\(?[-+−.\deE\s,]{3,2000}\)?", said)
    alone = [said.strip("()")] if bare else []
    for inside in [*reversed(re.findall(r"\[([^\[\]]{1,2000})\]", text)), *alone]:
        parts = [part.strip() for part in inside.replace("−", "-").rstrip(", ").split(",")]
        values = [float(part) for part in parts if _is_float(part)]
        if len(values) == len(parts) and all(map(math.isfinite, values)):
            return values
    return None


# ---------------------------------------------------------------------------------------------------------------- texts
def plain(text: str) -> str:
    """`text` in lower case, without marks and articles, words one space apart; "2x3" is "2 by 3"."""
    text = ascii_forms(re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]{0,200})\}", r"\1", text[-MOST_TEXT:]))
    text = re.sub(r"(?<=\d)\s?[x×*]\s?(?=\d)", " by ", text.casefold().replace("−", "-").replace("\\times", "×"))
    words = re.sub(r"[^\w.%+/-]+", " ", text).split()
    return " ".join(stripped for word in words if (stripped := word.strip(".")) not in ("", "a", "an", "the"))


def _parts(said: str) -> list[str]:
    """`said`, and what comes before an explanation of it."""
    cut = re.split(r"\s\(|[,;:]?\s(?:because|since|as|which|where)\b|[.;]\s", said, maxsplit=1)[0]
    return [said] if cut == said else [said, cut]


def _yes_or_no(text: str) -> str | None:
    """yes or no (also true or false), when a text begins with the one and does not go on with the other."""
    found = re.match(r"(yes|no|true|false)\b(?! (?:and|or) (?:yes|no|true|false)\b)(?!-)", plain(text))
    return {"true": "yes", "false": "no"}.get(found[1], found[1]) if found else None


def short_answer(text: str, golds: Sequence[str]) -> float:
    """1 when the final part is one of the golds: the same number, the same words in the same order, the same yes or no."""
    said = final_part(text)
    for gold in golds:
        wanted, found = _stated_number(gold), _stated_number(said)
        if any(plain(part) == plain(gold) for part in _parts(said)):
            return 1.0
        if "," in gold and re.sub(r"\band\b ?", "", plain(said)) == re.sub(r"\band\b ?", "", plain(gold)):
            return 1.0  # a list
        if plain(gold) in ("yes", "no", "true", "false") and _yes_or_no(said) == _yes_or_no(gold):
            return 1.0
        if None not in (wanted, found) and not re.search("[A-Za-z]{4,}", gold) and math.isclose(wanted, found):
            return 1.0
    return 0.0


def contains(text: str, golds: Sequence[str], without_spaces: bool = False) -> float:
    """OCRBench's rule: 1 when one of the golds occurs in the answer.

    Case does not count, and a line end is a space; for formulas (`without_spaces`) case counts and spaces do not.
    """
    if without_spaces:
        squeezed = re.sub(r"\s", "", text[-MOST_TEXT:])
        return float(any(gold.strip() and re.sub(r"\s", "", gold) in squeezed for gold in golds))
    said = text[-MOST_TEXT:].lower().strip().replace("\n", " ")
    return float(any(gold.strip() and gold.lower().strip().replace("\n", " ") in said for gold in golds))


def anls(text: str, golds: Sequence[str]) -> float:
    """The best similarity (1 - normalised edit distance) to a gold, whatever the case; 0 below ANLS_LEAST."""
    said = _folded(final_part(text))
    best = max((Levenshtein.normalized_similarity(said, _folded(gold)) for gold in golds), default=0)
    return float(best) if best >= ANLS_LEAST and said else 0.0


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())

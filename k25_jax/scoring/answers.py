"""What a model answered, found in what it wrote: letters, numbers, short texts; and rules that score them (K2.5 §4).

An answer is whatever a model wrote: no function here raises, or takes long, on any string.
"""

import ast
import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_TEXT = 20_000  # characters that are read, from the end
ANLS_LEAST = 0.5  # a similarity below that counts as none

_FINAL = re.compile(
    r"(?i)\b(?:answer\b[*_ ]{0,4}(?:is|are)?|(?:correct|right|best) (?:option|choice) is)[*_ ]{0,4}[:：]?"
)
_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
_WRAP = " \t\n*_`$.,;:\"'“”"


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{..}; None when there is none that closes."""
    text = text[-MOST_TEXT:]
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[begin:at]
    return None


def final_part(text: str) -> str:
    """The last thing said: in \\boxed{}, after the last "answer:" on its line, or else the last line."""
    text = text[-MOST_TEXT:].strip()
    if (inner := boxed(text)) is not None:
        return inner.strip(_WRAP)
    said = None
    for match in _FINAL.finditer(text):
        line = text[match.end() :].strip(_WRAP).split("\n", 1)[0]
        said = line.strip(_WRAP) or said
    return said if said is not None else text.rsplit("\n", 1)[-1].strip(_WRAP)


# -------------------------------------------------------------------------------------------------------------- letters
def choice(text: str, options: Sequence[str]) -> int | None:
    """Which of the options was chosen: by its letter, or else by its text; None when that cannot be told."""
    said = plain(final_part(text))
    same = [number for number, option in enumerate(options) if said and plain(option) == said]
    if len(same) == 1 and len(said) > 3:  # "Answer: A bus" is no choice of A
        return same[0]
    text, last = text[-MOST_TEXT:].strip(), LETTERS[len(options) - 1]
    letter = rf"(?<![A-Za-z0-9])([A-{last}])(?![A-Za-z0-9'’])"
    wrap = r"[\s*_`$({\[]{0,8}(?:\\(?:text|mathrm|mathbf|textbf|boxed)\{){0,3}[\s*_`$({\[]{0,8}"
    if (inner := boxed(text)) is not None and (found := re.match(wrap + letter, inner)):
        return LETTERS.index(found[1])
    if single := re.fullmatch(rf"(?i)\W{{0,8}}([A-{last}])\W{{0,8}}", text):
        return LETTERS.index(single[1].upper())
    option = r"(?:\s{0,2}(?:option|choice))?"
    if found := re.findall(_FINAL.pattern.replace("(?i)", "(?i:") + rf"){option}{wrap}{letter}", text):
        return LETTERS.index(found[-1])
    line = text.rsplit("\n", 1)[-1]
    if (first := re.match(rf"{wrap}{letter}[)\]}}*_.:]", line)) or (first := re.search(rf"\(([A-{last}])\)", line)):
        return LETTERS.index(first[1])
    return same[0] if len(same) == 1 else None


# -------------------------------------------------------------------------------------------------------------- numbers
def number(text: str) -> float | None:
    """A number, with separators, a unit, or a sign of money or per cent around it; None when there is not just one."""
    if ratio := re.fullmatch(r"\s*(-?\d{1,15})\s*/\s*([1-9]\d{0,14})\s*", text):
        return int(ratio[1]) / int(ratio[2])
    found = [match for match in _NUMBER.findall(text[-MOST_TEXT:]) if any(c.isdigit() for c in match)]
    if len(found) != 1:
        return None
    value = float(found[0].replace(",", "").replace("−", "-"))
    return value if math.isfinite(value) else None


def same_number(text: str, gold: float, digits: int) -> bool:
    """Whether the final part is the gold number, when both are rounded to `digits` decimals."""
    found = number(final_part(text))
    return found is not None and round(found, digits) == round(gold, digits)


def number_list(text: str) -> list[float] | None:
    """Numbers in brackets, the last that there are; None for anything else."""
    for inside in reversed(re.findall(r"\[([^\[\]]{1,2000})\]", text[-MOST_TEXT:])):
        try:
            values = ast.literal_eval(f"[{inside}]")
            return [float(value) for value in values]
        except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
            continue
    return None


# ---------------------------------------------------------------------------------------------------------------- texts
def plain(text: str) -> str:
    """`text` in lower case, without marks and articles, words one space apart."""
    text = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]{0,200})\}", r"\1", text[-MOST_TEXT:])
    words = re.sub(r"[^\w.%+−/-]+", " ", text.casefold()).split()
    return " ".join(stripped for word in words if (stripped := word.strip(".")) not in ("", "a", "an", "the"))


def short_answer(text: str, golds: Sequence[str]) -> float:
    """1 when the final part is one of the golds: the same number, or the same words in the same order."""
    said = final_part(text)
    for gold in golds:
        wanted, found = number(gold), number(said)
        if plain(said) == plain(gold):
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
        return float(any(re.sub(r"\s", "", gold) in squeezed for gold in golds))
    said = text[-MOST_TEXT:].lower().strip().replace("\n", " ")
    return float(any(gold.lower().strip().replace("\n", " ") in said for gold in golds))


def anls(text: str, golds: Sequence[str]) -> float:
    """The best similarity (1 - normalised edit distance) to a gold, whatever the case; 0 below ANLS_LEAST."""
    said = " ".join(final_part(text).casefold().split())
    best = max(
        (Levenshtein.normalized_similarity(said, " ".join(gold.casefold().split())) for gold in golds), default=0
    )
    return float(best) if best >= ANLS_LEAST else 0.0

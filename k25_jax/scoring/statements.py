"""Where a model states its answer: in a box, in a tag, after "answer:", or on its last line (K2.5 §4).

An answer is whatever a model wrote: no function here raises, or takes long, on any string.
"""

import re
import unicodedata

MOST_TEXT = 20_000  # characters that are read, from the end
MOST_LINE = 2_000  # characters that are read after a cue
WRAP = " \t\n*_`$.,;:\"'“”"

_THOUGHT = re.compile(r"</think(?:ing)?>|◁/think▷")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"(?i)<(?:final_?)?answer>([^<>]{1,2000}?)</(?:final_?)?answer>")

# --------------------------------------------------------------------------------------- the words that announce an answer
_MARKS = r"[\s*_`\"'”’)\]>}|]{0,8}"
_IS = (
    r"(?:[:：=]|->|→|\b(?:is|are|was|ist|est|es|è|é|lautet|adalah|(?:would|should|must|will|has to|could|may|might) be)\b"
    r"(?:[\s*_`]{0,4}[:：])?)"
)
_ABOUT = (
    r"(?:[\s,(](?:to|for|of|in|from|among|based|choices?|options?|letter|here|therefore|thus|then|should|correct[aeo])\b"
    r"[^.!?\n:]{0,80}?)?"
)
_WORDS = (
    "answers?|ans|antwort|antwoord|réponse|respuesta|risposta|resposta|ответ|jawaban|jibu|cevap|odpowiedź|svar|"
    "الإجابة|الجواب|إجابة|উত্তর|उत्तर"
)
_CHINESE = (
    r"(?:答案|正确选项|正解|答え|答复|回答|解答|答|정답|답변|답)\s{0,3}"
    r"(?:(?:应该?|應該?)?[是为為选選]|は|은|는|[:：])[\s*:：]{0,4}"
)
ANSWER_IS = rf"(?:(?<![^\W_])(?:{_WORDS})(?![^\W_]){_MARKS}{_ABOUT}{_MARKS}{_IS}|{_CHINESE}|^####)"
_CUE = re.compile(ANSWER_IS, re.IGNORECASE | re.MULTILINE)
_COMMENT = re.compile(
    r"(?i)(?:not|correct|right|wrong|incorrect|clear|obvious|given|shown|found|below|above|as follows)\b"
)


def spoken(text: str) -> str:
    """The end of `text` that is read, without thoughts before it."""
    text = text[-MOST_TEXT:]
    for match in reversed(list(_THOUGHT.finditer(text))):
        if text[match.end() :].strip():
            return text[match.end() :].strip()
    return text.strip()


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, inside) of every \\boxed{..} and \\fbox{..} that closes, by start."""
    found, open_at = [], []
    for match in _BRACES.finditer(text):
        token = match[0]
        if token.endswith("{") and token != "\\{":
            open_at.append((match.start(), match.end(), len(token) > 1))
        elif token == "}" and open_at:
            start, inside, is_box = open_at.pop()
            if is_box:
                found.append((start, match.end(), text[inside : match.start()]))
    return sorted(found)


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{..} that closes; None when there is none."""
    found = boxes(text[-MOST_TEXT:])
    return found[-1][2] if found else None


def final_part(text: str) -> str:
    """The last thing stated: in \\boxed{}, in <answer>, after "answer:" or "answer is" on its line; else the last line."""
    text = spoken(text)
    said = [(start, inside.strip(WRAP)) for start, _, inside in boxes(text)]
    said += [(match.start(1), match[1].strip(WRAP)) for match in _TAG.finditer(text)]
    for match in _CUE.finditer(text):
        line = text[match.end() : match.end() + MOST_LINE].lstrip(WRAP).split("\n", 1)[0].strip(WRAP)
        if line and not line.startswith("<") and not (_COMMENT.match(line) and not match[0].endswith((":", "："))):
            said.append((match.start(), line))
    last = max((item for item in said if item[1]), default=None)
    return unwrapped(last[1] if last else text.rsplit("\n", 1)[-1].strip(WRAP))


def unwrapped(text: str) -> str:
    """`text` without the marks of a formula, of a tag or of TeX's text around the whole of it."""
    for _ in range(4):
        inner = re.fullmatch(
            r"(?s)\\\((.*)\\\)|\\\[(.*)\\\]|\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}|<\w{1,20}>([^<>]*)</\w{1,20}>",
            text,
        )
        if inner is None:
            break
        text = next(group for group in inner.groups() if group is not None).strip(WRAP)
    return text


def ascii_forms(text: str) -> str:
    """`text` with full-width, circled and other forms of letters and digits as the plain ones (NFKC)."""
    return unicodedata.normalize("NFKC", text)

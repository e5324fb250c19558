"""What a terminal shows of a text that draws its lines again: progress bars by carriage return, backspace or cursor.

Colours, titles and links are left out; a line that was drawn again counts once. Halves of characters (surrogates) that
have no other half become U+FFFD.
"""

import re

from k25_jax.sandbox.observation import Excerpt

ROWS = 100  # lines that can still be drawn again
COLUMNS = 10_000  # a longer line cannot
_SEQUENCE = (
    r"\x1b(?:\[([0-9;?<=>]*)[ -/]*([@-~])|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[()*+#%][^\x1b]|[0-9=>A-NOQ-WYZc])"
)
_CONTROL = re.compile(rf"{_SEQUENCE}|[\r\x08\x07]")
_UNFINISHED = re.compile(r"\x1b(?:\[[0-9;?<=>]{0,32}[ -/]{0,8}|[\]PX^_][^\x07\x1b]{0,2000}\x1b?|[()*+#%])?\Z")
_LONGEST = 2100  # of what is unfinished


def clean(text: str) -> str:
    """The text without halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Screen:
    """Takes text in pieces, cut anywhere; keeps an excerpt of what a terminal would show in the end."""

    def __init__(self, most: int):
        self._above, self._lines = Excerpt(most), [""]
        self._row = self._column = 0
        self._rest = ""

    def write(self, text: str):
        """More of the text."""
        text = self._rest + text
        unfinished = _UNFINISHED.search(text, max(0, len(text) - _LONGEST)) if "\x1b" in text else None
        self._rest = text[unfinished.start() :] if unfinished else ""
        text = text[: unfinished.start()] if unfinished else text
        start = 0
        for control in _CONTROL.finditer(text):
            self._put(text[start : control.start()])
            start = control.end()
            self._move(control[0], control[1] or "", control[2] or "")
        self._put(text[start:])

    def begin_line(self):
        """The cursor to the start of a line, below all that is not empty."""
        if self._lines[-1]:
            self._lines.append("")
        self._row, self._column = len(self._lines) - 1, 0

    def excerpt(self) -> Excerpt:
        """All of it; nothing can be written afterwards."""
        self._above.add(clean("\n".join(self._lines)))
        return self._above

    def _put(self, text: str):
        """Text without anything but line feeds to move the cursor."""
        if not text:
            return
        first, *more = text.split("\n")
        self._overwrite(first)
        while more and self._row + 1 < len(self._lines):
            self._row, self._column = self._row + 1, 0
            self._overwrite(more.pop(0))
        if more:
            self._lines += more
            self._row, self._column = len(self._lines) - 1, len(more[-1])
        if len(self._lines) > ROWS:
            gone = len(self._lines) - ROWS
            self._above.add(clean("\n".join(self._lines[:gone]) + "\n"))
            del self._lines[:gone]
            self._row -= gone
        if len(self._lines[self._row]) > COLUMNS and self._row + 1 == len(self._lines):
            self._above.add(clean("\n".join(self._lines)))
            self._lines, self._row, self._column = [""], 0, 0

    def _overwrite(self, text: str):
        if not text:
            return
        line = self._lines[self._row].ljust(self._column)
        rest = line[self._column + len(text) :]
        line = line[: self._column] + text + rest
        self._lines[self._row] = line if not rest.isspace() else line.rstrip(" ")
        self._column += len(text)

    def _move(self, control: str, given: str, final: str):
        """What a control character or sequence does."""
        numbers = [int(number[:5] or 0) for number in given.split(";") if number.isdecimal() or not number]
        count = max(1, numbers[0] if numbers else 1)
        line = self._lines[self._row]
        if control == "\r" or final in "EF" and final:
            self._column = 0
        elif control == "\x08" or final == "D":
            self._column = max(0, self._column - count)
        elif final == "C":
            self._column = min(COLUMNS, self._column + count)
        elif final == "G":
            self._column = min(COLUMNS, count - 1)
        elif final in "HJ" and final and (final == "H" or numbers[:1] in ([2], [3])):
            self._home(final == "J")
        elif final == "J":
            self._lines = self._lines[: self._row] + [line[: self._column]]
        elif final == "K":
            kept = {1: " " * self._column + line[self._column :], 2: ""}
            self._lines[self._row] = kept.get(numbers[0] if numbers else 0, line[: self._column])
        elif final == "P":
            self._lines[self._row] = line[: self._column] + line[self._column + count :]
        if final in "AF" and final:
            self._row = max(0, self._row - count)
        elif final in "BE" and final:
            self._row = min(len(self._lines) - 1, self._row + count)

    def _home(self, erase: bool):
        """The cursor to the top of what can be drawn again; with all of it gone, if so."""
        self._row = self._column = 0
        if erase:
            self._lines = [""]

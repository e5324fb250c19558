"""Answerers for tests: they say what a function of the request says, and remember what they were asked."""

from collections.abc import Callable

from k25_jax.evals.protocol import Answer, Request


class Scripted:
    """Answers `say(request, number)`, in order; stops after `most` answers as a killed process does."""

    identity = {"scripted": True}

    def __init__(self, say: Callable[[Request, int], Answer | str], most: int = 10**9):
        self.say, self.most, self.asked = say, most, []

    def answer(self, requests):
        for number, request in enumerate(requests):
            if number == self.most:
                raise KeyboardInterrupt
            self.asked.append(request)
            said = self.say(request, number)
            yield number, said if isinstance(said, Answer) else Answer(said, len(said))


class Sums:
    """A task set: index + 1, asked for in words; the wording depends on the seed as options would."""

    name, category = "sums", "reasoning"

    def __init__(self, number: int = 6):
        self.number = number

    def __len__(self):
        return self.number

    def digest(self):
        return "sums"

    def prompt(self, index, seed):
        return [{"role": "user", "content": f"{index} + 1 = ? ({seed})"}]

    def gold(self, index, seed):
        return str(index + 1)

    def group(self, index):
        return "even" if index % 2 == 0 else "odd"

    def score(self, text, index, seed):
        return float(text == self.gold(index, seed))

    def guessing(self, indices):
        return 0.25


def right(request: Request, number: int) -> str:
    """The right answer to one of `Sums`."""
    return str(int(request.messages[0]["content"].split()[0]) + 1)

"""Write a tiny program; it is judged by running it on inputs that the question does not show."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import pick
from k25_jax.scoring.interpreter import ProgramError, Value, parse, run_parsed

RUNS = 12  # hidden inputs

# kind -> wordings and a right program. The input is x (a number), s (a string) or a (a list); i, j, k are numbers.
NUMBERS = {
    "line": (("x times {i} plus {j}", "{j} more than {i} times x"), "return x*{i}+{j}"),
    "minus": (("{i} times x minus {j}", "x times {i}, less {j}"), "return x*{i}-{j}"),
    "rest": (("x plus {j}, modulo {i}", "the rest of x plus {j} over {i}"), "return (x+{j})%{i}"),
    "choose": (("{i} if x is over {j}, else {k}", "{i} for x over {j}, or {k}"), "return {i} if x>{j} else {k}"),
    "clip": (("x, but at most {j}, plus {i}", "{i} plus the smaller of x and {j}"), "return min(x,{j})+{i}"),
}
STRINGS = {
    "repeat": (("s {i} times, then {j}", "{i} times s and {j}"), 'return s*{i}+"{j}"'),
    "first": (("the first {i} of s, then {j}", "s up to {i} letters, and {j}"), 'return s[:{i}]+"{j}"'),
    "back": (("s backwards, then {j}", "s from its end, and {j}"), 'return s[::-1]+"{j}"'),
    "length": (("{i} times the length of s, plus {j}", "length of s times {i}, plus {j}"), "return len(s)*{i}+{j}"),
}
LISTS = {
    "total": (("sum of a times {i} plus {j}", "{j} more than {i} times the sum of a"), "return sum(a)*{i}+{j}"),
    "over": (("how many of a are over {i}, plus {j}", "{j} plus the number over {i} in a"),
             "n={j}\nfor v in a:\n if v>{i}:n+=1\nreturn n"),
    "pick": (("those of a over {i}, plus {j}", "{j} more than each in a over {i}"), "return [v+{j} for v in a if v>{i}]"),
    "scale": (("each of a times {i} plus {j}", "a with {i} times each, plus {j}"), "return [v*{i}+{j} for v in a]"),
    "most": (("largest of a times {i} minus {j}", "{i} times the largest of a, less {j}"), "return max(a)*{i}-{j}"),
}  # fmt: skip
KINDS = {"x": NUMBERS, "s": STRINGS, "a": LISTS}


@dataclass(frozen=True)
class Problem:
    """What is asked for, a right program, and the inputs that answers are run on, with what is expected of each."""

    question: str
    program: str
    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Programs(Endless):
    """`inputs` is x (numbers), s (strings), a (lists) or any; numbers in the questions are 2 to `limit`.

    An answer scores 1 when it returns what is expected for every hidden input (`scoring.interpreter` runs it), else 0.
    Held out: the program with its numbers.
    """

    category: ClassVar[str] = "code"
    modality: ClassVar[str] = "text"
    longest: ClassVar[int] = 64

    inputs: str = "any"
    limit: int = 9

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("inputs", (*KINDS, "any"))
        self.check_range("limit", 5, 20)  # strings repeated so often stay in the bounds of programs

    def question(self, index: int) -> str:
        return self.scene(index).question

    def answer(self, index: int) -> str:
        return self.scene(index).program

    def key(self, scene: Problem) -> str:
        return scene.program

    def compose(self, generator: np.random.Generator) -> Problem:
        name = pick(generator, tuple(KINDS)) if self.inputs == "any" else self.inputs
        wordings, template = KINDS[name][pick(generator, tuple(KINDS[name]))]
        i, j, k = (int(number) for number in generator.permutation(np.arange(2, self.limit + 1))[:3])
        program = template.format(i=i, j=j, k=k)
        inputs = _inputs(name, generator, (i, j))
        statements = parse(program)
        outputs = tuple(run_parsed(statements, {name: value}) for value in inputs)
        return Problem(f"f({name}): {pick(generator, wordings).format(i=i, j=j, k=k)}", program, name, inputs, outputs)

    def score(self, prediction: str, index: int) -> float:
        problem = self.scene(index)
        try:
            statements = parse(prediction.strip())
            for value, expected in zip(problem.inputs, problem.outputs, strict=True):
                found = run_parsed(statements, {problem.name: value})
                if type(found) is not type(expected) or found != expected:
                    return 0.0
        except ProgramError:
            return 0.0
        return 1.0


def _inputs(name: str, generator: np.random.Generator, near: tuple[int, int]) -> tuple[Value, ...]:
    """Hidden inputs. Some lie beside the numbers of the question, where nearly right programs go wrong."""
    match name:
        case "x":
            edges = [number + step for number in near for step in (-1, 0, 1)]
            return (*edges, *generator.integers(0, 100, RUNS - len(edges)).tolist())
        case "s":
            lengths = [*range(1, RUNS - 2), near[0] - 1, near[0], near[0] + 1]
            return tuple("".join(map(chr, generator.integers(97, 123, length).tolist())) for length in lengths)
    lists = [generator.integers(0, 2 * max(near) + 2, int(generator.integers(1, 8))).tolist() for _ in range(RUNS - 1)]
    return (*lists, generator.permutation([number + step for number in near for step in (-1, 0, 1)]).tolist())

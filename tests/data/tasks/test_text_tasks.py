"""The invented world, puzzles and programs: worked out again in another way."""

import re
import textwrap

import numpy as np

from k25_jax.data.tasks import make_task, world
from k25_jax.data.tasks.emblems import PAPERS
from k25_jax.data.tasks.facts import QUESTIONS


# ----------------------------------------------------------------------------------------------------------- the world
def test_the_world_is_one_for_text_and_pictures():
    found = world.creatures(32, 0)
    assert len({creature.name for creature in found}) == 32
    assert len({(creature.shape, creature.field, creature.ink) for creature in found}) == 32
    values = [value for values in world.ATTRIBUTES.values() for value in values]
    assert len(set(values)) == len(values)  # a value says which attribute it is of
    assert world.creatures(32, 1) != found and world.creatures(8, 0)[0].name == found[0].name
    by_name = {creature.name: creature for creature in found}
    emblems = make_task("emblems:train")
    for index in range(100):
        creature, about = emblems.asked(index)
        assert by_name[creature.name] == creature
        assert emblems.answer(index) == (creature.name if about == "name" else creature.facts[about])


def _single(question):
    """(attribute, name) of a question for one fact; None for a list."""
    if question.startswith("list "):
        return None
    for wording in QUESTIONS:
        pattern = re.escape(wording).replace(r"\{0\}", "(?P<name>[a-z]{4})").replace(r"\{1\}", "(?P<about>[a-z]+)")
        if found := re.fullmatch(pattern, question):
            return found["about"], found["name"]
    raise AssertionError(question)


def test_held_out_facts_are_told_in_lists_and_never_asked_for_in_training():
    train, test = make_task("facts:train"), make_task("facts:test")
    held = {_single(test.question(index)): test.answer(index) for index in range(len(test))}
    assert len(held) * len(QUESTIONS) == len(test) >= 300
    asked, told = set(), {}
    for index in range(6000):
        single = _single(train.question(index))
        if single:
            asked.add(single)
            continue
        name = train.question(index).split()[-1]
        told |= {(fact.split()[0], name): fact.split()[1] for fact in train.answer(index).split(", ")}
    assert not asked & set(held) and len(asked | set(held)) == 32 * 6 and len(told) == 32 * 6
    assert all(told[pair] == answer for pair, answer in held.items())


def test_emblems_hold_out_facts_and_papers():
    train, test = make_task("emblems:train"), make_task("emblems:test")
    seen = {split: set() for split in ("train", "test")}
    papers = {split: set() for split in ("train", "test")}
    for task, number in ((train, 6000), (test, len(test))):
        for index in range(number):
            creature, about = task.asked(index)
            seen[task.split].add((creature.name, about))
            if index < 500:
                corner = tuple(task.image(index)[0, 0].tolist())
                papers[task.split].add((creature.name, PAPERS.index(corner)))
    held = {pair for pair in seen["test"] if pair[1] != "name"}
    assert not held & seen["train"] and len(held | seen["train"]) == 32 * 7
    assert not papers["train"] & papers["test"] and len({paper for _, paper in papers["test"]}) == len(PAPERS)
    # What no picture is asked about is told in text.
    facts = make_task("facts:train")
    told = " ".join(facts.question(index) + " " for index in range(3000))
    assert all(re.search(rf"{about}[a-z, ]* of {name} ", told) for name, about in held)


# -------------------------------------------------------------------------------------------------------------- puzzles
def _solve(question):
    """The answer to a puzzle, from its words."""
    head, _, tail = question.partition(": ")
    if found := re.fullmatch(r"(\d+)([+-])(\d+)", question):
        a, b = int(found[1]), int(found[3])
        return str(a + b if found[2] == "+" else a - b)
    if head == "largest":
        return max(tail.split(), key=int)
    if head == "sort":
        return " ".join(sorted(tail.split(), key=int))
    if head == "reverse":
        return "".join(reversed(tail))
    if head == "next":
        a, b, c = map(int, tail.split())
        assert c - b == b - a
        return str(c + c - b)
    if found := re.fullmatch(r"(.) in (\w+)", question):
        return str(sum(letter == found[1] for letter in found[2]))
    facts, asked = question.split(". ")
    taller = [
        (x, y) if way == "taller" else (y, x)
        for x, way, y in re.findall(r"(\w+) is (taller|shorter) than (\w+)", facts)
    ]
    ends = {x for x, _ in taller} - {y for _, y in taller}, {y for _, y in taller} - {x for x, _ in taller}
    (answer,) = ends[asked == "shortest?"]
    return answer


def test_puzzles_are_solved_right():
    for split in ("train", "test"):
        task = make_task(f"puzzles:{split}")
        for index in range(400):
            assert task.answer(index) == _solve(task.question(index)), task.question(index)
    kinds = [re.sub(r"\d+|[a-z]+ in \w+|reverse: \w+", "#", make_task("puzzles:train").question(i)) for i in range(200)]
    assert len(set(kinds)) > 8


# ------------------------------------------------------------------------------------------------------------- programs
def _python(program, name, value):
    names = {}
    exec(f"def f({name}):\n" + textwrap.indent(program, "  "), names)
    return names["f"](value)


def test_hidden_outputs_are_those_of_python():
    task = make_task("programs:test")
    for index in range(120):
        problem = task.scene(index)
        assert len(problem.inputs) == 12
        for value, output in zip(problem.inputs, problem.outputs, strict=True):
            assert _python(problem.program, problem.name, value) == output


def test_programs_are_judged_by_what_they_do():
    task = make_task("programs:test:inputs=x")
    index = next(index for index in range(200) if re.fullmatch(r"return x\*\d+\+\d+", task.answer(index)))
    i, j = map(int, re.findall(r"\d+", task.answer(index)))
    same = [
        f"return {j}+x*{i}",
        f"y=x*{i}\nreturn y+{j}",
        f"  return x*{i}+{j}  ",
        f"t={j}\nfor k in range({i}):t+=x\nreturn t",
    ]
    assert [task.score(program, index) for program in same] == [1.0] * 4
    wrong = [f"return x*{i}", f"return x*{i}-{j}", f"return str(x*{i}+{j})", f"return x*{i}+{j} if x<50 else 0", "x",
             f"print(x*{i}+{j})", f"x*{i}+{j}", "while 1: pass"]  # fmt: skip
    assert [task.score(program, index) for program in wrong] == [0.0] * len(wrong)


def test_a_number_that_is_off_by_one_is_found_out():
    """Hidden inputs lie beside the numbers of the question."""
    task, caught = make_task("programs:test"), 0
    for index in range(150):
        gold = task.answer(index)
        places = [found.start() for found in re.finditer(r"(?<![\w.])\d", gold)]
        for place in places:
            near = f"{gold[:place]}{int(gold[place]) + 1}{gold[place + 1 :]}"
            if not (gold[place] == "1" or "::-1" in gold):
                assert task.score(near, index) == 0.0, (gold, near)
                caught += 1
    assert caught > 120
    assert np.mean([task.score("return x", index) for index in range(50)]) == 0.0

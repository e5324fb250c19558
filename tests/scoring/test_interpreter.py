"""Tiny programs against Python itself, and programs that must not get far."""

import ast
import textwrap

import numpy as np
import pytest

from k25_jax.scoring.interpreter import MOST_ITEMS, ProgramError, run

RIGHT = [
    "return x*2+1",
    "return -x if x<3 else +x//2%5",
    "t=0\nfor v in a:\n if v>2:t+=v\nreturn t",
    "t=0\nwhile t*t<x*9:\n t+=1\nreturn t",
    "for v in a:\n if v%2:continue\n if v>4:break\n x-=v\nreturn x",
    "return [v*x for v in a if v!=x if v]",
    "v=7\nb=[v for v in a]\nreturn b+[v]",
    "return s[::-1]+s[1:]+s[-1]",
    "return s*2 if len(s)>2 and x else str(x)+'!'",
    "return a[0:2]+a[-1:]+[x]*2",
    "return max(a)-min(a)+sum(a)+abs(-x)+len(s)",
    "return sorted(s)[0]+'b' if 'a' in s else 'none'",
    "return x in a or x not in [1,2] and not x",
    "return 1<x<=7!=3",
    "return 0 or s",
    "return [] and x",
    "return sum(range(x))+sum(range(1,x,2))",
    "return int(str(x)+'0')",
    "r=''\nfor c in s:\n r=c+r\nreturn r",
    "return list(s)",
    "if x>3:\n return 'big'\nelif x>1:\n return 'some'\nelse:\n return 'small'",
    "pass\nx\nreturn x==True",
    "return min(x,3)",
]


def _python(program, inputs):
    """The same program as a function of Python's; only programs of this file come here."""
    names = {}
    exec(f"def f({', '.join(inputs)}):\n" + textwrap.indent(program, "  "), names)
    return names["f"](**inputs)


@pytest.mark.parametrize("program", RIGHT)
def test_programs_do_what_python_does(program):
    for x, s, a in ((0, "ab", [1]), (3, "cab", [3, 1, 4, 1, 5]), (7, "x", [2, 0, 7, 8]), (1, "aba", [6, 6])):
        inputs = {"x": x, "s": s, "a": a}
        found, expected = run(program, inputs), _python(program, inputs)
        assert found == expected and type(found) is type(expected)


def _random_expression(generator, depth):
    if depth == 0:
        return str(generator.choice(["x", "y", "1", "2", "3", "0"]))
    left, right = (_random_expression(generator, depth - 1) for _ in range(2))
    form = generator.choice(
        ["({}+{})", "({}-{})", "({}*{})", "({}//{})", "({}%{})", "({}<{})", "({} or {})", "({} and {})"]
    )
    return str(form).format(left, right)


def test_random_arithmetic_is_that_of_python():
    generator, failures = np.random.default_rng(0), 0
    for _ in range(400):
        program = f"return {_random_expression(generator, 4)}"
        inputs = {"x": int(generator.integers(-9, 10)), "y": int(generator.integers(-9, 10))}
        try:
            expected = _python(program, inputs)
        except ZeroDivisionError:
            failures += 1
            with pytest.raises(ProgramError, match="ZeroDivisionError"):
                run(program, inputs)
        else:
            assert run(program, inputs) == expected, (program, inputs)
    assert 10 < failures < 350


REFUSED = {
    "import os": "Import is not allowed",
    "return __import__('os')": "Call is not allowed",
    "return ().__class__": "Attribute is not allowed",
    "return s.upper()": "Call is not allowed",
    "return (lambda: 1)()": "Call is not allowed",
    "def f(): return f()\nreturn f()": "FunctionDef is not allowed",
    "class A: pass": "ClassDef is not allowed",
    "return eval('1')": "Call is not allowed",
    "return open('/etc/passwd')": "Call is not allowed",
    "return sorted(a, key=len)": "Call is not allowed",
    "return max(*a)": "Starred is not allowed",
    "return f'{x}'": "JoinedStr is not allowed",
    "return '%99999999d' % 1": "% of a string",
    "return x**x**x**x": "Pow is not allowed",
    "return x<<999999": "LShift is not allowed",
    "return 1.5": "float",
    "return b'x'": "bytes",
    "return 1j": "complex",
    "return ...": "ellipsis",
    "return None": "NoneType",
    "return": "Return is not allowed",
    "return len": "there is no len",
    "return y": "there is no y",
    "return [[1]]": "a list in a list",
    "return 'a'*999999999": f"more than {MOST_ITEMS} items",
    "return [0]*99999999999": f"more than {MOST_ITEMS} items",
    "return 99999999999*[0]": f"more than {MOST_ITEMS} items",
    "while True:\n s=s+s": "too large",
    "while 1: pass": "steps",
    "while 1:\n for v in range(200): x=v": "steps",
    "x=9\nwhile 1: x=x*x": "too large",
    "return 9"+"9" * 300: "too large",
    "return range(10000000000)": "a range of more than|OverflowError",
    "return [v for v in range(256) for w in range(256)]": "ListComp is not allowed",
    "x=1": "returns nothing",
    "": "returns nothing",
    "break": "outside a loop",
    "for v in x: pass": "a loop over something other",
    "return a[99]": "IndexError",
    "return a['x']": "TypeError",
    "return x//0": "ZeroDivisionError",
    "return int('x')": "ValueError",
    "return int('٤')": "other than ASCII",
    "return sorted([1,'a'])": "TypeError",
    "return list(x)": "TypeError",
    "a[0]=a": "Assign is not allowed",
    "a.append(a)": "Call is not allowed",
    "x,y=1,2": "Assign is not allowed",
    "return x is x": "Is is not allowed",
    "return {1:2}": "Dict is not allowed",
    "return (1,2)": "Tuple is not allowed",
    "return (x:=1)": "NamedExpr is not allowed",
    "return await x": "Await is not allowed|cannot be read",
    "yield x": "Yield is not allowed",
    "raise x": "Raise is not allowed",
    "try:\n pass\nfinally:\n pass": "Try is not allowed",
    "with x: pass": "With is not allowed",
    "global x": "Global is not allowed",
    "del x": "Delete is not allowed",
    "for v in a: pass\nelse: pass": "For is not allowed",
    "return x +": "cannot be read",
    "  return x": "cannot be read",
    "return \x00": "cannot be read",
    "return \ud800": "cannot be read",
    "return " + "(" * 400 + "x" + ")" * 400: "cannot be read",
    "return " + "-" * 900 + "x": "cannot be read|RecursionError|steps",
    "return " + "not " * 240 + "x": None,
    "return " + "[" * 150 + "]" * 150: "a list in a list|RecursionError",
    "x" * 2000: "more than 1000 characters",
    "return " + "+".join(["x"] * 400): None,
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_not_allowed_is_an_error_of_ours(number):
    program, message = list(REFUSED.items())[number]
    inputs = {"x": 5, "s": "ab", "a": [1, 2]}
    if message is None:  # long, and right
        assert run(program, inputs) == _python(program, inputs)
        return
    with pytest.raises(ProgramError, match=message):
        run(program, inputs)


def test_random_programs_end_well():
    """Any soup of tokens gives a value or a ProgramError."""
    generator = np.random.default_rng(1)
    tokens = ["return ", "x", "s", "a", "=", "+", "*", "(", ")", "[", "]", "if ", "for v in ", ":", "\n", " ", "9", "while ",
              "'", ",", "len", "sum", "range", "str", "-", "%", "//", "<", "and ", "v", "sorted", "list", "int"]  # fmt: skip
    values = 0
    for _ in range(4000):
        program = "return " * int(generator.integers(2)) + "".join(
            generator.choice(tokens, generator.integers(1, 9)).tolist()
        )
        inputs = {"x": 5, "s": "ab", "a": [1, 2]}
        try:
            value = run(program, inputs)
        except ProgramError:
            continue
        values += 1
        assert isinstance(value, (int, str, list)) and inputs == {"x": 5, "s": "ab", "a": [1, 2]}
        ast.parse(program)
    assert values > 20


def test_a_program_cannot_change_its_inputs():
    inputs = {"a": [3, 1]}
    assert run("b=a\nb+=[9]\na=sorted(a)\nreturn b+a", inputs) == [3, 1, 9, 1, 3] and inputs == {"a": [3, 1]}

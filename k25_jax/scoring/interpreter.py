"""Run tiny programs that nobody has checked: a subset of Python, walked node by node, with limits on all it does.

`run("return x*2", {"x": 4})` gives 8. There are whole numbers, truth values, strings, and lists of these; names,
arithmetic, comparisons, `if`, `for`, `while`, comprehensions of one `for`, and the functions of FUNCTIONS. There are no
attributes, imports, definitions or calls of anything else: what is not named here is refused. Python itself never runs
a program's text. Lists are values: no program can change a list that two names have.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

MOST_TEXT = 1000  # characters of a program
MOST_STEPS = 4000  # nodes visited
MOST_ITEMS = 512  # of a list or string
MOST_NUMBER = 2**63  # of a whole number, without its sign

Value = int | bool | str | list


class ProgramError(ValueError):
    """A program that cannot be read, goes wrong or takes too long; the message says why."""


class _Return(Exception):
    """A `return` was reached; its value is the only argument."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def _range(*bounds: int) -> list:
    numbers = range(*bounds)
    if len(numbers) > MOST_ITEMS:
        raise ProgramError(f"a range of more than {MOST_ITEMS} numbers")
    return list(numbers)


def _int(value: Value) -> int:
    if isinstance(value, str) and not value.isascii():
        raise ProgramError("int() of other than ASCII")
    return int(value)


FUNCTIONS: Mapping[str, Callable] = {
    "len": len,
    "sum": sum,
    "min": min,
    "max": max,
    "abs": abs,
    "sorted": sorted,
    "list": list,
    "range": _range,
    "int": _int,
    "str": str,
}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
SIGNS = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}


def run(program: str, inputs: Mapping[str, Value]) -> Value:
    """What the program returns for these inputs; raises ProgramError for everything that is wrong with it."""
    return run_parsed(parse(program), inputs)


def parse(program: str) -> list[ast.stmt]:
    """The statements of a program; raises ProgramError."""
    if len(program) > MOST_TEXT:
        raise ProgramError(f"more than {MOST_TEXT} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd escapes and the like
            return ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise ProgramError(f"cannot be read: {problem}") from None


def run_parsed(statements: Sequence[ast.stmt], inputs: Mapping[str, Value]) -> Value:
    """`run`, of statements that `parse` gave."""
    machine = _Machine(inputs)
    try:
        machine.block(statements)
    except _Return as ended:
        return ended.args[0]
    except (_Break, _Continue):
        raise ProgramError("break or continue outside a loop") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError) as problem:
        raise ProgramError(f"{type(problem).__name__}: {problem}"[:200]) from None
    raise ProgramError("returns nothing")


class _Machine:
    """The names of a running program, and the steps it has left."""

    def __init__(self, inputs: Mapping[str, Value]):
        self._names = dict(inputs)
        self._steps = MOST_STEPS

    def block(self, statements: Sequence[ast.stmt]):
        for statement in statements:
            self._statement(statement)

    def _step(self):
        self._steps -= 1
        if self._steps < 0:
            raise ProgramError(f"takes more than {MOST_STEPS} steps")

    def _statement(self, node: ast.stmt):
        self._step()
        match node:
            case ast.Return(value=ast.expr() as value):
                raise _Return(self._value(value))
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._names[name] = self._value(value)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                self._names[name] = self._operate(op, self._name(name), self._value(value))
            case ast.If(test=test, body=body, orelse=orelse):
                self.block(body if self._value(test) else orelse)
            case ast.For(target=ast.Name(id=name), iter=items, body=body, orelse=[]):
                self._loop(self._bind(name, self._items(items)), body)
            case ast.While(test=test, body=body, orelse=[]):
                self._loop(iter(lambda: bool(self._value(test)), False), body)
            case ast.Expr(value=value):
                self._value(value)
            case ast.Break():
                raise _Break
            case ast.Continue():
                raise _Continue
            case ast.Pass():
                pass
            case _:
                raise ProgramError(f"{type(node).__name__} is not allowed")

    def _loop(self, rounds: Iterator, body: Sequence[ast.stmt]):
        for _ in rounds:
            self._step()
            try:
                self.block(body)
            except _Continue:
                continue
            except _Break:
                return

    def _bind(self, name: str, items: Sequence[Value]) -> Iterator[None]:
        for item in items:
            self._names[name] = item
            yield

    def _value(self, node: ast.expr) -> Value:
        self._step()
        return _checked(self._expression(node))

    def _expression(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(name)
            case ast.List(elts=items):
                return [self._value(item) for item in items]
            case ast.BinOp(left=left, op=op, right=right):
                return self._operate(op, self._value(left), self._value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in SIGNS:
                return SIGNS[type(op)](self._value(operand))
            case ast.BoolOp(op=op, values=values):
                return self._either(isinstance(op, ast.Or), values)
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._compare(left, ops, others)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._value(body if self._value(test) else orelse)
            case ast.Subscript(value=value, slice=ast.Slice() as part):
                bounds = (
                    None if bound is None else self._value(bound) for bound in (part.lower, part.upper, part.step)
                )
                return self._value(value)[slice(*bounds)]
            case ast.Subscript(value=value, slice=part):
                return self._value(value)[self._value(part)]
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](*[self._value(argument) for argument in arguments])
            case ast.ListComp(elt=item, generators=[ast.comprehension(target=ast.Name(id=name), is_async=0) as loop]):
                return self._comprehension(item, name, loop)
        raise ProgramError(f"{type(node).__name__} is not allowed")

    def _name(self, name: str) -> Value:
        if name not in self._names:
            raise ProgramError(f"there is no {name}")
        return self._names[name]

    def _items(self, node: ast.expr) -> Sequence[Value]:
        items = self._value(node)
        if not isinstance(items, (list, str)):
            raise ProgramError("a loop over something other than a list or a string")
        return items

    def _operate(self, op: ast.operator, left: Value, right: Value) -> Value:
        if type(op) not in OPERATORS:
            raise ProgramError(f"{type(op).__name__} is not allowed")
        if isinstance(op, ast.Mod) and isinstance(left, str):
            raise ProgramError("% of a string is not allowed")
        if isinstance(op, ast.Mult):
            for items, times in ((left, right), (right, left)):
                if isinstance(items, (str, list)) and isinstance(times, int) and len(items) * times > MOST_ITEMS:
                    raise ProgramError(f"more than {MOST_ITEMS} items")
        return _checked(OPERATORS[type(op)](left, right))

    def _either(self, until: bool, nodes: Sequence[ast.expr]) -> Value:
        """`or` stops at the first true value, `and` at the first false one; both give the last value that they saw."""
        for node in nodes:
            value = self._value(node)
            if bool(value) == until:
                break
        return value

    def _compare(self, left: ast.expr, ops: Sequence[ast.cmpop], others: Sequence[ast.expr]) -> bool:
        value = self._value(left)
        for op, node in zip(ops, others, strict=True):
            other = self._value(node)
            if type(op) not in COMPARISONS:
                raise ProgramError(f"{type(op).__name__} is not allowed")
            if not COMPARISONS[type(op)](value, other):
                return False
            value = other
        return True

    def _comprehension(self, item: ast.expr, name: str, loop: ast.comprehension) -> list:
        hidden, found = dict(self._names), []
        for _ in self._bind(name, self._items(loop.iter)):
            if all(self._value(test) for test in loop.ifs):
                found.append(self._value(item))
        self._names = hidden
        return found


def _checked(value: Value) -> Value:
    """The value, if it is of a kind and a size that programs may have."""
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) < MOST_NUMBER):
        return value
    if isinstance(value, (str, list)) and len(value) <= MOST_ITEMS:
        if isinstance(value, list) and any(isinstance(item, list) for item in value):
            raise ProgramError("a list in a list")
        return value
    raise ProgramError(f"a {type(value).__name__} that is too large, or not allowed")

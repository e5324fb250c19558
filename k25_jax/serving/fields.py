"""A JSON body taken apart field by field; every mistake is an ApiError that names the field."""

import json

from k25_jax.config.checks import nearest
from k25_jax.serving.errors import ApiError, show

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def read_json(raw: bytes) -> dict:
    """The object that a body holds; raises ApiError for anything else, and for numbers that JSON does not have."""
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else problem
        raise ApiError(f"the body is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(f'the body must be an object such as {{"model": ..}}, not {show(value)}', code="invalid_json")
    return value


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


class Fields:
    """The fields of an object that are not read yet. null counts as left out."""

    def __init__(self, values: dict, where: str = ""):
        self._left = {name: value for name, value in values.items() if value is not None}
        self._known: set[str] = set()
        self._where = f"{where}." if where else ""

    def take(self, name: str, *kinds: type, default=None, required: bool = False):
        """The value of a field, of one of these kinds; a whole number is also a number."""
        self._known.add(name)
        if name not in self._left:
            if required:
                raise ApiError(f"{self._where}{name} is missing", self._where + name, "missing_required_parameter")
            return default
        value = self._left.pop(name)
        fits = kinds + (int,) * (float in kinds)
        if not isinstance(value, fits) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(KINDS[kind] for kind in kinds)
            raise self.error(name, f"must be {wanted}, not {show(value)}", "invalid_type")
        return value

    def number(self, name: str, kind: type, default, low: float, high: float):
        """A number from `low` to `high`, both included."""
        value = self.take(name, kind, default=default)
        if value is not None and not low <= value <= high:
            raise self.error(name, f"must lie between {low} and {high}, not {show(value)}", "invalid_value")
        return value

    def neutral(self, **allowed):
        """Fields that may only say what happens anyway: a value, or one of a tuple; None: nothing."""
        for name, values in allowed.items():
            self._known.add(name)
            values = values if isinstance(values, tuple) else (values,)
            if name in self._left and self._left.pop(name) not in values:
                remedy = "leave it out" if values == (None,) else f"leave it out, or send {json.dumps(values[0])}"
                raise self.error(name, f"is not supported; {remedy}", "unsupported_parameter")

    def ignored(self, *names: str):
        """Fields that change nothing here, whatever they say."""
        for name in names:
            self._left.pop(name, None)

    def end(self):
        """Raise for a field that nobody has read."""
        for name in self._left:
            short = name[:60]
            raise self.error(short, f"is not known{nearest(short, self._known)}", "unknown_parameter")

    def error(self, name: str, problem: str, code: str | None = None) -> ApiError:
        """An error about one field."""
        return ApiError(f"{self._where}{name} {problem}", self._where + name, code)

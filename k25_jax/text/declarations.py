"""Tools as K2.5 is told of them: functions whose parameters have types in TypeScript's form (K2.5 §4).

    # Tools

    ## functions
    namespace functions {
    // What the weather is like.
    type get_weather = (_: {
      // a town
      place: string,
      // Default: "C"
      unit?: "C" | "F"
    }) => any;
    }

Required fields come first, and both kinds go by name. `$defs` become interfaces in front of the function. The strings are
those of the public tokenizer, and so are the gaps: words and limits are written for fields and items only, and keywords like
`oneOf`, `const`, `format` or `nullable` are passed over beside a `type`. With a schema of nothing but them there is no such
form, and all tools are declared as JSON, as the public tokenizer does; a warning says what to write instead.
"""

import json
import logging
from collections.abc import Mapping, Sequence

from k25_jax.text.tool_calls import TOOL_NAME

INDENT = "  "
SCALARS = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}
TYPES = SCALARS | {"object": "{}", "array": "Array<any>"}  # in a list of types
RANGE, LENGTH, COUNT = ("maximum", "minimum"), ("maxLength", "minLength", "pattern"), ("maxItems", "minItems")
LIMITS = {"number": RANGE, "integer": RANGE, "string": LENGTH, "array": COUNT}
VALUES = {"string": str, "number": (int, float), "integer": int, "boolean": bool}


logger = logging.getLogger(__name__)


class DeclarationError(ValueError):
    """A tool that cannot be declared; the text begins with the place, tools[i].., and says what to do."""


class SchemaError(DeclarationError):
    """A schema that may be right and has no form in TypeScript."""


def declare(tools: Sequence[Mapping]) -> str:
    """Declarations of `{"type": "function", "function": {"name", "description", "parameters"}}`; raises DeclarationError.

    `parameters` are a JSON Schema. If one of them has no form in TypeScript, all are written as JSON.
    """
    try:
        return typescript(tools)
    except SchemaError as problem:
        logger.warning("%s (so the tools are declared as JSON)", problem)
        return json.dumps(tools, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def typescript(tools: Sequence[Mapping]) -> str:
    """What `declare` gives where all schemas have that form; raises DeclarationError, SchemaError where one has not."""
    functions, formless = [], None
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        try:
            plain = json.loads(json.dumps(tool, allow_nan=False, sort_keys=True))
        except (TypeError, ValueError, RecursionError) as problem:
            raise DeclarationError(f"{where} cannot be written as JSON: {problem}") from None
        try:
            functions.append(_function(plain, where))
        except SchemaError as problem:
            formless = formless or problem  # the tools behind it may be wrong
        except RecursionError:
            raise DeclarationError(f"{where} is nested too deeply; put the parts into $defs") from None
    if formless:
        raise formless
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(functions) + "\n}\n"


def _function(tool, where: str) -> str:
    """The interfaces and the type of one tool, which is of plain JSON values with sorted keys."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise DeclarationError(f"{where} must be {{'type': 'function', 'function': {{'name': .., ..}}}}")
    where = f"{where}.function"
    name, parameters = function.get("name"), function.get("parameters") or {}
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise DeclarationError(f"{where}.name must be letters, digits, '_', '.' and '-', not {name!r:.60}")
    place, types = f"{where}.parameters", _Types()
    if not isinstance(parameters, dict):
        raise DeclarationError(f"{place} must be a JSON Schema of an object, not {parameters!r:.60}")
    root, interfaces = types.object(parameters, "", place), ""
    if types.root_is_named:
        root = "parameters"
        interfaces = f"interface parameters {types.object(parameters, '', place, is_interface=True)}\n"
    for title, schema in list(types.definitions.items()):  # without those that come up in them, as in the public one
        inside = f"{place}.$defs.{title}"
        interfaces += _words(schema, "", inside) + f"interface {title} {types.type(schema, '', inside)}\n"
    return f"{interfaces}{_words(function, '', where)}type {name} = (_: {root}) => any;"


class _Types:
    """The types in one function. `$defs` are known once the object that holds them has begun."""

    def __init__(self):
        self.definitions: dict[str, dict] = {}
        self.root_is_named = False  # something refers to the parameters as a whole

    def type(self, schema, indent: str, where: str) -> str:
        """A schema as a type, whose lines but the first are indented."""
        if isinstance(schema, bool):
            return "any" if schema else "null"
        if not isinstance(schema, dict):
            raise DeclarationError(f"{where} must be a JSON Schema such as {{'type': 'string'}}, not {schema!r:.60}")
        if "$ref" in schema:
            return self._reference(schema["$ref"], f"{where}.$ref")
        if "anyOf" in schema:
            options = enumerate(_listed(schema, "anyOf", where))
            return " | ".join(self.type(option, indent, f"{where}.anyOf[{number}]") for number, option in options)
        if "enum" in schema:
            return _enum(schema, where)
        kind = schema.get("type", None if schema else "any")
        if isinstance(kind, list):
            return _union(schema, where)
        if not kind or not isinstance(kind, str):
            remedy = "give it a `type`, `enum`, `anyOf` or `$ref`; `oneOf`, `allOf` and `const` are not understood"
            raise SchemaError(f"{where} has no type that can be declared: {remedy}")
        if kind == "object":
            return self.object(schema, indent, where)
        return self._array(schema, indent, where) if kind == "array" else SCALARS.get(kind, kind)

    def object(self, schema: dict, indent: str, where: str, is_interface: bool = False) -> str:
        """Fields in braces; in the interface of the parameters they go by name alone, and there are no others."""
        self._define(schema.get("$defs") or {}, f"{where}.$defs")
        inner, others = indent + INDENT, schema.get("additionalProperties")
        if others is not None:
            kind = "never" if others is False else self.type(others, inner, f"{where}.additionalProperties")
            others = f"{inner}[k: string]: {kind}"
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise DeclarationError(f"{where}.properties must map names to schemas, not {properties!r:.60}")
        required = schema.get("required", []) if properties else []
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise DeclarationError(f"{where}.required must be a list of names of properties, not {required!r:.60}")
        fields, required = {}, set(required)
        for name, field in properties.items():
            fields[name] = self._field(name, name in required, field, inner, f"{where}.properties.{name}")
        names = list(fields) if is_interface else sorted(fields, key=lambda name: name not in required)
        lines = [fields[name] for name in names] + ([others] if others and not is_interface else [])
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if lines else "{}"

    def _field(self, name: str, required: bool, schema, indent: str, where: str) -> str:
        comments = _comments(schema, indent, where)
        default = schema.get("default") if isinstance(schema, dict) else None
        if default is not None:
            shown = str(default) if isinstance(default, bool) else json.dumps(default, ensure_ascii=False)
            comments += f"{indent}// Default: {shown}\n"
        return f"{comments}{indent}{name}{'' if required else '?'}: {self.type(schema, indent, where)}"

    def _array(self, schema: dict, indent: str, where: str) -> str:
        item, inner, where = schema.get("items") or True, indent + INDENT, f"{where}.items"
        comments = _comments(item, inner, where)
        if not comments:
            return f"Array<{self.type(item, indent, where)}>"
        return f"Array<\n{comments}{inner}{self.type(item, inner, where)}\n{indent}>"

    def _define(self, definitions, where: str) -> None:
        if not isinstance(definitions, dict) or not all(isinstance(schema, dict) for schema in definitions.values()):
            raise SchemaError(f"{where} must map names to schemas that are objects")
        self.definitions |= definitions

    def _reference(self, to, where: str) -> str:
        if to == "#":
            self.root_is_named = True
            return "parameters"
        name = to.split("/")[-1] if isinstance(to, str) and to.startswith("#/$defs/") else None
        if name not in self.definitions:
            remedy = "write '#', or '#/$defs/NAME' with NAME in the $defs of parameters"
            raise SchemaError(f"{where} refers to {to!r:.60}, which is not known: {remedy}")
        return name


def _enum(schema: dict, where: str) -> str:
    """Values as Python writes them. A `type` beside them, if it is one or one and null, must fit."""
    values, kind = _listed(schema, "enum", where), schema.get("type")
    if isinstance(kind, list):
        others = [name for name in kind if name != "null"]
        if len(kind) > 2 or len(others) > 1:
            raise SchemaError(f"{where}.type beside enum may list one type, and null; leave it out")
        kind = others[0] if others else None
    wanted = VALUES.get(kind, object) if isinstance(kind, str) else object
    for value in values:
        if value is not None and not isinstance(value, wanted):
            raise DeclarationError(f"{where}.enum holds {value!r:.60}, which is no {kind}; correct it, or `type`")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def _union(schema: dict, where: str) -> str:
    kinds = _listed(schema, "type", where)
    for kind in kinds:
        if not isinstance(kind, str) or kind not in TYPES:
            raise DeclarationError(f"{where}.type lists {kind!r:.60}; use {', '.join(TYPES)}, or anyOf")
    return " | ".join(TYPES[kind] for kind in kinds)


def _listed(schema: dict, name: str, where: str) -> list:
    if not isinstance(schema[name], list) or not schema[name]:
        raise DeclarationError(f"{where}.{name} must be a list that is not empty; correct it or leave it out")
    return schema[name]


def _comments(schema, indent: str, where: str) -> str:
    """What is said of a field or an item, and its limits, as lines of comment."""
    if not isinstance(schema, dict):
        return ""
    kind = None if schema.keys() & {"$ref", "anyOf", "enum"} else schema.get("type")
    names = LIMITS.get(kind, ()) if isinstance(kind, str) else ()
    limits = ", ".join(f"{name}: {schema[name]}" for name in names if name in schema)
    return _words(schema, indent, where) + (f"{indent}// {limits}\n" if limits else "")


def _words(schema: dict, indent: str, where: str) -> str:
    """Its description as lines of comment; what is empty stays so."""
    text = schema.get("description") or ""
    if not isinstance(text, str):
        raise DeclarationError(f"{where}.description must be a string, not {text!r:.60}")
    return "".join(f"{indent}// {line}\n" if line else "\n" for line in text.split("\n")) if text else ""

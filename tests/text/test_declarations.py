"""Tools in TypeScript's form: strings of the public form, bad schemas, and properties that hold for any schema."""

import json
import random

import pytest

from k25_jax.text.declarations import DeclarationError, SchemaError, declare, typescript


def tool(parameters=None, name="f", **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters} | more}


def lines_of(*tools):
    """What stands in the namespace."""
    text = declare(tools)
    begin, end = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(begin) and text.endswith(end)
    return text.removeprefix(begin).removesuffix(end).split("\n")


def fields_of(properties, required=(), **more):
    """The lines of one function's fields."""
    first, *lines, last = lines_of(tool({"properties": properties, "required": list(required)} | more))
    assert (first, last) == ("type f = (_: {", "}) => any;")
    return lines


def test_a_whole_declaration():
    weather = tool(
        {
            "type": "object",
            "required": ["place"],
            "properties": {
                "unit": {"enum": ["C", "F"], "type": "string", "default": "C"},
                "place": {"type": "string", "description": "a town\n\nor a village", "maxLength": 40},
                "days": {"type": "integer", "minimum": 1, "maximum": 7.5, "default": 3, "format": "int32"},
            },
            "additionalProperties": False,
        },
        "get_weather",
        description="What the weather is like.\nÜnits: °C",
    )
    assert (
        declare([weather, tool(name="now.utc-1", description="")])
        == """# Tools

## functions
namespace functions {
// What the weather is like.
// Ünits: °C
type get_weather = (_: {
  // a town

  // or a village
  // maxLength: 40
  place: string,
  // maximum: 7.5, minimum: 1
  // Default: 3
  days?: number,
  // Default: "C"
  unit?: "C" | "F",
  [k: string]: never
}) => any;
type now.utc-1 = (_: {}) => any;
}
"""
    )


FORMS = {
    "any": [{}, True, {"type": "any"}, {"type": "any", "nullable": True}],
    "null": [False, {"type": "null"}],
    "number": [{"type": "integer"}, {"type": "number", "multipleOf": 2}],
    "boolean": [{"type": "boolean", "oneOf": [{}]}],
    "float": [{"type": "float"}],  # no type of JSON Schema, but it is in use
    "number | null | {} | Array<any>": [{"type": ["integer", "null", "object", "array"]}],
    "string": [{"type": ["string"], "minLength": 3}],
    '"a" | "b\\"" | 1 | 2.5 | True | None': [{"enum": ["a", 'b\\"', 1, 2.5, True, None]}],
    '"a" | None': [{"enum": ["a", None], "type": ["null", "string"]}],
    "string | Array<number>": [
        {"anyOf": [{"type": "string", "description": "lost"}, {"type": "array", "items": {"type": "integer"}}]}
    ],
    "Array<any>": [{"type": "array"}, {"type": "array", "items": {}}, {"type": "array", "items": None}],
    "Array<Array<string>>": [{"type": "array", "items": {"type": "array", "items": {"type": "string"}}}],
    "{}": [{"type": "object"}, {"type": "object", "properties": {}, "required": ["x"]}],
}


@pytest.mark.parametrize("form, schema", [(form, schema) for form, schemas in FORMS.items() for schema in schemas])
def test_the_type_of_a_schema(form, schema):
    assert fields_of({"x": schema}, ["x"]) == [f"  x: {form}"]


def test_required_fields_come_first_and_all_go_by_name():
    assert fields_of(dict.fromkeys(["b", "a", "B", "ü", "a b"], True), ["b", "ghost", "B"]) == [
        *("  B: any,", "  b: any,", "  a?: any,", "  a b?: any,", "  ü?: any"),
    ]


def test_objects_in_objects_and_arrays():
    point = {"type": "object", "properties": {"x": {"type": "number", "description": "right"}}, "required": ["x"]}
    described = {"type": "array", "minItems": 1, "items": point | {"description": "a corner"}}
    others = {"type": "object", "additionalProperties": point | {"description": "lost"}}
    assert fields_of({"path": described, "plain": {"type": "array", "items": point}, "by_name": others}) == [
        "  by_name?: {",
        "    [k: string]: {",
        "      // right",
        "      x: number",
        "    }",
        "  },",
        "  // minItems: 1",
        "  path?: Array<",
        "    // a corner",
        "    {",
        "      // right",
        "      x: number",
        "    }",
        "  >,",
        "  plain?: Array<{",
        "    // right",
        "    x: number",
        "  }>",
    ]


@pytest.mark.parametrize(
    "default, shown",
    [(True, "True"), (0, "0"), (1.0, "1.0"), (1e21, "1e+21"), ("ü\n", '"ü\\n"'), ({"b": [None], "a": True}, None)],
)
def test_defaults(default, shown):
    shown = shown or '{"a": true, "b": [null]}'
    assert fields_of({"x": {"default": default, "anyOf": [{}]}}) == [f"  // Default: {shown}", "  x?: any"]
    assert fields_of({"x": {"default": None, "type": "null"}}) == ["  x?: null"]


def test_definitions_are_interfaces():
    definitions = {
        "Tree": {"type": "object", "description": "a tree", "properties": {"left": {"$ref": "#/$defs/Tree"}}},
        "Colour": {"enum": ["red"], "type": "string"},
    }
    root = {"$ref": "#/$defs/Tree", "description": "where it begins"}
    assert lines_of(tool({"$defs": definitions, "properties": {"root": root}}, description="Grow.")) == [
        'interface Colour "red"',
        "// a tree",
        "interface Tree {",
        "  left?: Tree",
        "}",
        "// Grow.",
        "type f = (_: {",
        "  // where it begins",
        "  root?: Tree",
        "}) => any;",
    ]


def test_parameters_that_hold_themselves_are_an_interface():
    """By name alone and without other fields: so it is in the public form."""
    properties = {"next": {"$ref": "#"}, "value": {"type": "string"}}
    recursive = tool({"properties": properties, "required": ["value"], "additionalProperties": False})
    assert lines_of(recursive) == [
        *("interface parameters {", "  next?: parameters,", "  value: string", "}"),
        "type f = (_: parameters) => any;",
    ]


BAD = [
    ("x", r"tools\[0\] must be"),
    ({"type": "function"}, r"tools\[0\] must be"),
    ({"type": "browser", "function": {"name": "f"}}, r"tools\[0\] must be"),
    (tool(name="two words"), r"tools\[0\]\.function\.name must be letters"),
    (tool(object()), r"tools\[0\] cannot be written as JSON"),
    (tool({"properties": {"x": {"default": float("nan")}}}), r"tools\[0\] cannot be written as JSON"),
    (tool([1]), r"tools\[0\]\.function\.parameters must be a JSON Schema"),
    (tool(description=["x"]), r"tools\[0\]\.function\.description must be a string"),
    (tool({"properties": ["x"]}), r"\.parameters\.properties must map"),
    (tool({"properties": {"x": {}}, "required": True}), r"\.parameters\.required must be a list"),
    (tool({"$defs": {"A": True}}), r"\.parameters\.\$defs must map"),
    (tool({"additionalProperties": "no"}), r"\.parameters\.additionalProperties must be a JSON Schema"),
]
BAD_FIELDS = [
    ("string", r"x must be a JSON Schema"),
    ({"oneOf": [{"type": "string"}]}, r"x has no type that can be declared: give it"),
    ({"type": None}, r"x has no type"),
    ({"type": ["string", "text"]}, r"x\.type lists 'text'; use string"),
    ({"type": []}, r"x\.type must be a list that is not empty"),
    ({"anyOf": {}}, r"x\.anyOf must be a list"),
    ({"anyOf": [{}, {"const": 1}]}, r"x\.anyOf\[1\] has no type"),
    ({"enum": []}, r"x\.enum must be a list"),
    ({"enum": [1, "a"], "type": "integer"}, r"x\.enum holds 'a', which is no integer"),
    ({"enum": [1], "type": ["integer", "string"]}, r"x\.type beside enum"),
    ({"type": "array", "items": [{}]}, r"x\.items must be a JSON Schema"),
    ({"$ref": "#/definitions/A"}, r"x\.\$ref refers to '#/definitions/A', which is not known: write"),
    ({"$ref": 3}, r"x\.\$ref refers to 3"),
    ({"type": "string", "description": 3}, r"x\.description must be a string"),
]


@pytest.mark.parametrize("bad, error", BAD)
def test_bad_tools_are_named(bad, error):
    with pytest.raises(DeclarationError, match=error):
        typescript([bad])


@pytest.mark.parametrize("field, error", BAD_FIELDS)
def test_bad_schemas_are_named(field, error):
    nested = {"properties": {"a": {"type": "array", "items": {"type": "object", "properties": {"x": field}}}}}
    with pytest.raises(
        DeclarationError, match=rf"^tools\[1\]\.function\.parameters\.properties\.a\.items\.properties\.{error}"
    ):
        typescript([tool(), tool(nested)])


FORMLESS = {"properties": {"x": {"const": 1}, "y": {"oneOf": [{"type": "string"}]}}}


def test_what_has_no_form_is_declared_as_json_as_the_public_tokenizer_does(caplog):
    tools = [tool(), tool(FORMLESS, name="é")]
    with pytest.raises(SchemaError):
        typescript(tools)
    text = declare(tools)
    assert (
        text == json.dumps(tools, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        and json.loads(text) == tools
    )
    assert "tools[1].function.parameters.properties.x has no type that can be declared: give it" in caplog.text
    assert declare(tools[:1]).startswith("# Tools")


def test_a_wrong_tool_behind_one_without_a_form_is_still_refused():
    with pytest.raises(DeclarationError, match=r"tools\[1\]\.function\.name"):
        declare([tool(FORMLESS), tool(name="two words")])


@pytest.mark.parametrize("depth", [700, 100_000])
def test_what_is_nested_too_deeply_is_refused(depth):
    schema: dict = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    with pytest.raises(DeclarationError, match=r"tools\[0\] (is nested too deeply|cannot be written)"):
        declare([tool({"properties": {"x": schema}})])


def random_schema(rng, depth):
    schema = {"description": rng.choice(["one", "two\nlines", ""]), "default": rng.choice([None, {"b": 1, "a": 2}])}
    kinds = ["string", "integer", "enum", "any of", "array", "object"]
    kind = rng.choice(kinds if depth else kinds[:3])
    if kind == "enum":
        return schema | {"enum": ["x", 1]}
    if kind == "any of":
        return schema | {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    if kind == "array":
        return schema | {"type": kind, "minItems": 1, "items": random_schema(rng, depth - 1)}
    if kind == "object":
        names = rng.sample("abcde", 3)
        properties = {name: random_schema(rng, depth - 1) for name in names}
        return schema | {"type": kind, "properties": properties, "required": names[:1]}
    return schema | {"type": kind, "minimum": 0, "pattern": "x"}


def shuffled(rng, value):
    """The same JSON with its keys in another order."""
    if isinstance(value, list):
        return [shuffled(rng, item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: shuffled(rng, value[name]) for name in rng.sample(sorted(value), len(value))}


@pytest.mark.parametrize("seed", range(30))
def test_the_order_of_keys_does_not_matter_and_lines_are_indented_by_depth(seed):
    rng = random.Random(seed)
    one = tool({"type": "object", "properties": {name: random_schema(rng, 3) for name in "abc"}})
    kept = json.dumps(one)
    text = declare([one])
    assert declare([shuffled(rng, one)]) == text and json.dumps(one) == kept
    depth = 0
    for line in text.split("\n")[5:-3]:
        depth -= line.lstrip()[0] in "}>"
        assert len(line) - len(line.lstrip()) == 2 * (depth + 1)
        depth += line.endswith(("{", "<"))
    assert depth == 0

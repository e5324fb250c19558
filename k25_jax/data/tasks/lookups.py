"""Answer with what a tool gives back: conversations with calls, without pictures (tool use in text, K2.5 §3.4).

The tool looks a name up in a table that only it knows. In a record it is not run: what it gives follows from the table.
`agents.tasks` makes it a tool that is called.
"""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless, TaskError
from k25_jax.data.tasks.drawing import pick
from k25_jax.data.tasks.recall import name_of, value_of

TOOLS = ("lookup", "find", "fetch", "search", "get")
FIELDS = ("name", "key", "query", "of")
TOLD = ("Look up a name.", "Find the value of a name in the table.", "The table, by name. A value may be a name again.")
WORDINGS = ("{0}?", "what is {0}?", "tell me {0}", "look up {0}")
AGAIN = ("look {0} up, and then what you find", "{0}, twice", "the value of the value of {0}?")


@dataclass(frozen=True)
class Table:
    """A tool with its one field, the wording, the names that are looked up one after the other, and the last value.

    `beside` are names and values that are given back together with the value that was asked for.
    """

    tool: tuple[str, str, str]
    wording: str
    names: tuple[str, ...]
    value: str
    beside: tuple[tuple[str, str], ...]

    @property
    def parameters(self) -> dict:
        """The JSON schema of the tool's arguments."""
        return {"type": "object", "properties": {self.tool[1]: {"type": "string"}}, "required": [self.tool[1]]}

    def look_up(self, name: str) -> str | None:
        """What the tool gives: the value, or lines of names and values among which it is; None for an unknown name."""
        values = dict(self.beside) | dict(zip(self.names, (*self.names[1:], self.value), strict=True))
        if name not in values or not self.beside:
            return values.get(name)
        rows = dict(self.beside) | {name: values[name]}
        return "\n".join(f"{each}: {rows[each]}" for each in sorted(rows))


@dataclass(frozen=True)
class Lookups(Endless):
    """One or two calls, then the answer, which is what came back. Held out: the first name with the last value."""

    category: ClassVar[str] = "tool_use"
    modality: ClassVar[str] = "text"

    def compose(self, generator: np.random.Generator) -> Table:
        tool = (pick(generator, TOOLS), pick(generator, FIELDS), pick(generator, TOLD))
        names = tuple({name_of(generator): None for _ in range(1 + int(generator.random() < 0.3))})
        wording = pick(generator, WORDINGS if len(names) == 1 else AGAIN)
        beside = tuple((name_of(generator), value_of(generator)) for _ in range(int(generator.integers(4))))
        return Table(tool, wording, names, value_of(generator), beside if generator.random() < 0.4 else ())

    def key(self, scene: Table) -> str:
        return f"{scene.names[0]} {scene.value}"

    def question(self, index: int) -> str:
        scene = self.scene(index)
        return scene.wording.format(scene.names[0])

    def answer(self, index: int) -> str:
        return self.scene(index).value

    def prompt(self, index: int) -> list[dict]:
        raise TaskError("lookups cannot be asked without its tool, a table: train on it, or play agents.tasks.TaskEnv")

    def record(self, index: int) -> dict:
        """The whole conversation, and the tool."""
        scene = self.scene(index)
        name, field, told = scene.tool
        messages = [{"role": "user", "content": [{"type": "text", "text": self.question(index)}]}]
        for number, asked in enumerate(scene.names):
            call = {"id": f"functions.{name}:{number}", "type": "function"}
            call["function"] = {"name": name, "arguments": json.dumps({field: asked})}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": scene.look_up(asked)})
        messages.append({"role": "assistant", "content": scene.value})
        function = {"name": name, "description": told, "parameters": scene.parameters}
        return {"messages": messages, "tools": [{"type": "function", "function": function}], "mode": "instant"}

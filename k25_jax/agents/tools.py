"""Tools: how they are declared to a model, called, and answered (K2.5 §4.4).

conversation = Conversation(tokenizer, [declaration(tool) for tool in tools])
..
said = conversation.say(tokens)
for call in said.calls:
    tool = tool_for(call, tools)
    observation = tool if isinstance(tool, Observation) else tool.call(call.arguments)
    conversation.add(reply(call, observation))

`agents.rollout` does this with deadlines.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from k25_jax.sandbox.observation import Observation
from k25_jax.sandbox.sandbox import Sandbox
from k25_jax.text.tool_calls import BadCall, Call

TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


class Tool(Protocol):
    """A function for the model. `parameters` is the JSON schema of its arguments, an object.

    `call` may block, and is then made in a thread, one call of an episode after the other; or be a coroutine function: those
    of one turn are awaited together.
    """

    name: str
    description: str
    parameters: Mapping

    def call(self, arguments: Mapping) -> Observation:
        """Do it. What the model did wrong is an observation; InfrastructureError is for what it cannot help."""


class IPython:
    """The tool `ipython`: code in a sandbox, which keeps its state from call to call; `seconds` is each call's deadline."""

    name = "ipython"
    description = (
        "Run Python code in IPython and see what it prints, the value of its last line, and the images that it displays. "
        "Variables are kept between calls. There is no network."
    )
    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "the code to run"}},
        "required": ["code"],
    }

    def __init__(self, sandbox: Sandbox, seconds: float = 60.0):
        self._sandbox, self._seconds = sandbox, seconds

    def call(self, arguments: Mapping) -> Observation:
        """Run `code`."""
        return self._sandbox.run(arguments["code"], self._seconds)


def declaration(tool: Tool) -> dict:
    """What the chat template tells the model of a tool."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def tool_for(call: Call | BadCall, tools: Sequence[Tool]) -> Tool | Observation:
    """The tool to call; or, for a call that cannot be made, what the model hears instead."""
    named = {tool.name: tool for tool in tools}
    if isinstance(call, BadCall):
        return Observation(f"Error: {call.error}", status="error")
    if call.name not in named:
        return Observation(f"Error: there is no tool {call.name}; there are: {', '.join(named)}", status="error")
    if problem := check_arguments(call.arguments, named[call.name].parameters):
        return Observation(f"Error: {problem}", status="error")
    return named[call.name]


def reply(call: Call | BadCall, observation: Observation) -> dict:
    """The turn that answers a call."""
    message = {"role": "tool", "tool_call_id": call.id, "content": observation.content()}
    return message | ({"name": call.name} if isinstance(call, Call) else {})


def check_arguments(arguments: Mapping, schema: Mapping) -> str:
    """What is wrong with arguments, or "": names, and the types at the top level, are checked."""
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in arguments:
            return f"the argument {name} is missing"
    for name, value in arguments.items():
        if name not in properties:
            return f"there is no argument {name}; there are: {', '.join(properties)}"
        wanted = properties[name].get("type")
        if wanted in TYPES and (
            not isinstance(value, TYPES[wanted]) or (isinstance(value, bool) and wanted != "boolean")
        ):
            return f"the argument {name} must be of type {wanted}, not {type(value).__name__}"
    return ""

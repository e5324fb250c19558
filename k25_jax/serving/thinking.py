"""The fields by which clients switch the thinking on and off, and keep that of earlier answers.

`thinking` {"type": "enabled" | "disabled", "keep": "all"}, true or false; `chat_template_kwargs` {"thinking" or
"enable_thinking": bool, "keep_thinking": bool}; `enable_thinking`; `reasoning_effort`, and `reasoning` {"effort", "enabled"}.
An effort of none or minimal is no thinking, any other is thinking: there are no degrees of it. What is said twice must agree.
"""

from k25_jax.serving.errors import show
from k25_jax.serving.fields import Fields

EFFORTS = {"none": False, "minimal": False} | dict.fromkeys(("low", "medium", "high", "xhigh", "max"), True)
TYPES = {"enabled": True, "disabled": False}
KEEPS = {"all": True, "none": False}


def read_thinking(fields: Fields, mode: str) -> tuple[str, bool]:
    """The mode of the chat template, `mode` where nothing is said, and whether the thinking of earlier answers stays."""
    wanted: dict[str, bool | None] = {}
    kept: dict[str, bool | None] = {}
    switch = fields.take("thinking", dict, bool, default={})
    if isinstance(switch, bool):
        wanted["thinking"] = switch
    else:
        inner = Fields(switch, "thinking")
        wanted["thinking"] = _choice(inner, "type", TYPES)
        kept["thinking.keep"] = _keep(inner)
        inner.neutral(budget_tokens=None)
        inner.end()
    extra = Fields(fields.take("chat_template_kwargs", dict, default={}), "chat_template_kwargs")
    for name in ("thinking", "enable_thinking"):
        wanted[f"chat_template_kwargs.{name}"] = extra.take(name, bool)
    kept["chat_template_kwargs.keep_thinking"] = extra.take("keep_thinking", bool)
    extra.end()
    wanted["enable_thinking"] = fields.take("enable_thinking", bool)
    wanted["reasoning_effort"] = _choice(fields, "reasoning_effort", EFFORTS)
    reasoning = Fields(fields.take("reasoning", dict, default={}), "reasoning")
    wanted["reasoning.effort"] = _choice(reasoning, "effort", EFFORTS)
    wanted["reasoning.enabled"] = reasoning.take("enabled", bool)
    reasoning.neutral(exclude=False, max_tokens=None, summary=None)
    reasoning.end()
    thinks = _agreed(fields, wanted)
    return mode if thinks is None else ("thinking" if thinks else "instant"), bool(_agreed(fields, kept))


def _choice(fields: Fields, name: str, meanings: dict[str, bool]) -> bool | None:
    """What one of several words means; None where there is none."""
    value = fields.take(name, str)
    if value is not None and value not in meanings:
        raise fields.error(name, f"must be one of {', '.join(meanings)}, not {show(value)}", "invalid_value")
    return meanings.get(value)


def _keep(fields: Fields) -> bool | None:
    value = fields.take("keep", str, bool)
    if isinstance(value, str) and value not in KEEPS:
        raise fields.error("keep", f"must be one of {', '.join(KEEPS)}, not {show(value)}", "invalid_value")
    return KEEPS.get(value, value)


def _agreed(fields: Fields, said: dict[str, bool | None]) -> bool | None:
    """The one value of those that are not None."""
    given = {name: value for name, value in said.items() if value is not None}
    for name, value in given.items():
        first = next(iter(given))
        if value != given[first]:
            raise fields.error(first, f"and {name} contradict each other; send one of them", "invalid_value")
    return next(iter(given.values()), None)

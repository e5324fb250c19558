"""Trajectories for SFT: programs that were run in the sandbox on pictures, written as chats with calls (K2.5 §3.4).

Zero-vision: the pictures are only in the sandbox, and the chat is text. `shown` trajectories have them in the user's turn
as well. What the tool gave back is what the sandbox gave back.
"""

import json
import pathlib
from collections.abc import Callable, Sequence

from PIL import Image

from k25_jax.agents.pictures import Pictures
from k25_jax.agents.sandbox import Sandbox
from k25_jax.agents.tools import declaration
from k25_jax.config import ConfigError
from k25_jax.data.tasks import PROGRAMMED, make_task
from k25_jax.data.tasks.programmed import Programmed

MODE = "instant"  # these programs take no thought
FILE = "trajectories.jsonl"
TRAINED = tuple(f"{name}:train" for name in PROGRAMMED)


def demonstrate(
    folder: pathlib.Path,
    records: int,
    shown: bool = False,
    specs: Sequence[str] = TRAINED,
    on_progress: Callable[[int], None] | None = None,
) -> pathlib.Path:
    """Write `records` trajectories, of each task in turn, and return the JSONL file; raises ConfigError.

    The pictures of `shown` trajectories lie beside it. It is there when it is whole.
    """
    tasks = [make_task(spec) for spec in specs]
    for spec, task in zip(specs, tasks, strict=True):
        if not isinstance(task, Programmed) or task.split != "train":
            raise ConfigError(f"{spec} has no programs to learn from; there are {', '.join(TRAINED)}")
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    file, temporary = folder / FILE, folder / f"{FILE}.tmp"
    with Sandbox() as sandbox, open(temporary, "w") as out:
        tool = Pictures(sandbox, seconds=20)
        for number in range(records):
            index, task = number // len(tasks), tasks[number % len(tasks)]
            pictures = _write_pictures(folder, task, index) if shown else []
            out.write(json.dumps(trajectory(task, index, tool, pictures), ensure_ascii=False) + "\n")
            if on_progress:
                on_progress(1)
    temporary.replace(file)
    return file


def trajectory(task: Programmed, index: int, tool: Pictures, pictures: Sequence[str] = ()) -> dict:
    """A chat: the question, behind `pictures` if any, each cell of the program as a call and what it gave, the answer."""
    tool.show(task.media(index))
    question = {"type": "text", "text": task.question(index)}
    messages = [{"role": "user", "content": [*({"type": "image", "image": name} for name in pictures), question]}]
    for number, cell in enumerate(task.program(index)):
        call = {"id": f"functions.{tool.name}:{number}", "type": "function"}
        call["function"] = {"name": tool.name, "arguments": json.dumps({"code": cell})}
        seen = tool.call({"code": cell})
        if seen.status != "ok":
            raise ConfigError(f"{task.name}:{task.split}[{index}]: its program failed: {seen.text}")
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": seen.text})
    messages.append({"role": "assistant", "content": task.answer(index)})
    return {"messages": messages, "tools": [declaration(tool)], "mode": MODE}


def _write_pictures(folder: pathlib.Path, task: Programmed, index: int) -> list[str]:
    """The pictures of a record as files, by their paths in `folder`."""
    names = [f"pictures/{task.name}-{index}-{i}.png" for i in range(len(task.media(index)))]
    for name, picture in zip(names, task.media(index), strict=True):
        Image.fromarray(picture).save(folder / name)
    return names

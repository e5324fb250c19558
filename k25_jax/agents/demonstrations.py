"""Trajectories for SFT: programs that were run in the sandbox on pictures, written as chats with calls (K2.5 §3.4).

Zero-vision: the pictures are only in the sandbox, and the chat is text. The same trajectories are also written with the
pictures shown in the user's turn. What the tool gave back is what the sandbox gave back.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import queue
from collections.abc import Callable, Sequence

from PIL import Image

from k25_jax.agents.pictures import Pictures
from k25_jax.agents.tools import declaration
from k25_jax.config import ConfigError
from k25_jax.data.tasks import PROGRAMMED, make_task
from k25_jax.data.tasks.programmed import Programmed
from k25_jax.sandbox.sandbox import Sandbox

MODE = "instant"  # these programs take no thought
TEXT, SHOWN = "text.jsonl", "shown.jsonl"
TRAINED = tuple(f"{name}:train" for name in PROGRAMMED)


def demonstrate(
    folder: pathlib.Path,
    records: int,
    specs: Sequence[str] = TRAINED,
    width: int = 6,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `records` trajectories, of each task in turn, to TEXT and SHOWN in `folder`; raises ConfigError.

    The pictures of SHOWN lie beside it. `width` programs run at once. Both files are there when they are whole.
    """
    tasks = [make_task(spec) for spec in specs]
    for spec, task in zip(specs, tasks, strict=True):
        if not isinstance(task, Programmed) or task.split != "train":
            raise ConfigError(f"{spec} has no programs to learn from; there are {', '.join(TRAINED)}")
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    files = {folder / name: folder / f"{name}.tmp" for name in (TEXT, SHOWN)}
    with contextlib.ExitStack() as stack:
        text, shown = (stack.enter_context(open(temporary, "w")) for temporary in files.values())
        tools: queue.SimpleQueue[Pictures] = queue.SimpleQueue()
        for _ in range(width):
            tools.put(stack.enter_context(Pictures(Sandbox, seconds=20)))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(width))

        def work(number: int) -> tuple[dict, list[str]]:
            task, index, tool = tasks[number % len(tasks)], number // len(tasks), tools.get()
            record = trajectory(task, index, tool)
            tools.put(tool)
            return record, _write_pictures(folder, task, index)

        for record, names in pool.map(work, range(records)):
            text.write(json.dumps(record, ensure_ascii=False) + "\n")
            question = record["messages"][0]
            question["content"] = [*({"type": "image", "image": name} for name in names), *question["content"]]
            shown.write(json.dumps(record, ensure_ascii=False) + "\n")
            if on_progress:
                on_progress(1)
    for file, temporary in files.items():
        temporary.replace(file)


def trajectory(task: Programmed, index: int, tool: Pictures) -> dict:
    """A chat without pictures: the question, each cell of the program as a call and what it gave, the answer."""
    tool.lay_out(task.media(index))
    messages = [{"role": "user", "content": [{"type": "text", "text": task.question(index)}]}]
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

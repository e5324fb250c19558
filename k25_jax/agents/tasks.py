"""Tasks as environments: any task of `data/tasks`, asked directly or with the tool `ipython` (K2.5 §3.4, §3.5).

env = TaskEnv("scenes:train", index)
env = TaskEnv("dots:train", index, lend=pool.sandbox)  # of a sandbox.pool.KernelPool
env = TaskEnv("lookups:train", index)  # with the table as its tool
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from k25_jax.agents.demonstrations import MODE
from k25_jax.agents.pictures import Lend, Pictures
from k25_jax.agents.threads import Late, in_thread
from k25_jax.agents.tools import Tool
from k25_jax.agents.trace import Trace
from k25_jax.config import ConfigError
from k25_jax.data.tasks import Task, make_task
from k25_jax.data.tasks.lookups import Lookups, Table
from k25_jax.sandbox.observation import Observation
from k25_jax.text.tool_calls import Said

CONDITIONS = ("shown", "hidden", "blank")
TURNS = 4
SECONDS = 5.0  # of a call
CLOSE_SECONDS = 5.0  # that the end of an episode waits for a call under way


class QuestionEnv:
    """Messages to answer, their pictures as arrays; with `lend` the tool `ipython` is there, with the pictures in it.

    shown: the pictures are in the messages and in the sandbox. hidden: in the sandbox only, as zero-vision SFT has them.
    blank: in both places, but white; whoever still answers right has guessed.
    """

    def __init__(
        self,
        task: str,
        group: str,
        messages: Callable[[], Sequence[Mapping]],
        condition: str = "shown",
        lend: Lend | None = None,
        seconds: float = SECONDS,
        mode: str = "",
    ):
        if condition not in CONDITIONS:
            raise ConfigError(f"{task}: condition={condition!r} must be one of {', '.join(CONDITIONS)}")
        self.task, self.group, self.mode = task, group, mode or (MODE if lend else "plain")
        self.tools: list[Tool] = []
        self._pictures: Pictures | None = None
        self._messages, self._condition, self._lend, self._seconds = messages, condition, lend, seconds

    async def reset(self, seed: int) -> Sequence[Mapping]:
        """The messages, whatever the seed."""
        pictures: list[np.ndarray] = []
        messages = [self._shown(message, pictures) for message in self._messages()]
        if self._lend:
            self._pictures = Pictures(self._lend, self._seconds)
            self._pictures.lay_out(pictures)
            self.tools = [self._pictures]
        return messages

    @property
    def ran(self) -> bool:
        """Whether a call of the last episode ran without an error."""
        return self._pictures is not None and "ok" in self._pictures.statuses

    def _shown(self, message: Mapping, pictures: list[np.ndarray]) -> Mapping:
        """A message under the condition; the pictures for the sandbox are appended."""
        if isinstance(message["content"], str):
            return message
        parts = []
        for part in message["content"]:
            kind = next((kind for kind in ("image", "video") if kind in part), None)
            if kind is not None:
                if self._condition == "blank":
                    part = part | {kind: np.full_like(part[kind], 255)}
                pictures.append(part[kind])
            if kind is None or self._condition != "hidden":
                parts.append(part)
        return message | {"content": parts}

    async def step(self, said: Said) -> Sequence[Mapping]:
        """Nothing follows on the answer."""
        return ()

    def score(self, trace: Trace, answer: str) -> Mapping[str, float]:
        """Nothing is known of what is right."""
        return {}

    async def close(self) -> None:
        """Give the sandbox back; one whose call hangs comes back when it ends."""
        if self._pictures:
            with contextlib.suppress(Late):
                await in_thread(self._pictures.close, seconds=CLOSE_SECONDS)


class LookUp:
    """The tool of a record of `lookups`: a table."""

    def __init__(self, table: Table):
        (self.name, self._field, self.description), self.parameters = table.tool, table.parameters
        self._table = table

    def call(self, arguments: Mapping) -> Observation:
        """Look a name up."""
        name = arguments[self._field]
        found = self._table.look_up(name)
        return (
            Observation(f"Error: {name} is not in the table", status="error") if found is None else Observation(found)
        )


class TaskEnv(QuestionEnv):
    """Question `index` of a task; the reward `outcome` is the task's score of the answer, 0 without one."""

    def __init__(
        self,
        task: Task | str,
        index: int,
        condition: str = "shown",
        lend: Lend | None = None,
        seconds: float = SECONDS,
        mode: str = "",
    ):
        spec = task if isinstance(task, str) else f"{task.name}:{task.split}"
        self._task, self._index = make_task(task) if isinstance(task, str) else task, index
        table = LookUp(self._task.scene(index)) if isinstance(self._task, Lookups) else None
        mode = mode or (MODE if table else "")
        super().__init__(spec, f"{spec}[{index}]", self._prompt, condition, lend, seconds, mode)
        self.tools = [table] if table else []

    def _prompt(self) -> Sequence[Mapping]:
        if isinstance(self._task, Lookups):  # which has no prompt without its tool
            return self._task.record(self._index)["messages"][:1]
        return self._task.prompt(self._index)

    def score(self, trace: Trace, answer: str) -> Mapping[str, float]:
        """By the task."""
        return {"outcome": self._task.score(answer, self._index) if trace.ending == "answer" else 0.0}

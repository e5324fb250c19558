"""What is known of an invented world, in text: facts are told in lists, and asked for one by one."""

from dataclasses import dataclass
from typing import ClassVar

from k25_jax.data.tasks import MILLION, Task
from k25_jax.data.tasks.drawing import pick, pick_some
from k25_jax.data.tasks.world import ATTRIBUTES, MOST, creatures, pairs

QUESTIONS = (
    "{0} {1}?",
    "{1} of {0}?",
    "what is the {1} of {0}?",
    "{0}'s {1}?",
    "which {1} has {0}?",
    "tell me the {1} of {0}.",
    "{0}: {1}?",
    "name {0}'s {1}.",
)


@dataclass(frozen=True)
class Facts(Task):
    """`creatures` of a `world`, with 6 facts each.

    Train: a list of 2 to 6 facts of a creature ("list food, home of zubo" gives "food fig, home lake"), whichever they
    are; or a question for one fact. Held out: one fact in four is never asked for in a question; the test split asks for
    those, in all wordings. So it asks what was read, in a way in which it was not trained on.
    """

    category: ClassVar[str] = "text_knowledge"
    modality: ClassVar[str] = "text"
    longest: ClassVar[int] = 96

    creatures: int = 32
    world: int = 0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_range("creatures", 4, MOST)

    def __len__(self) -> int:
        return MILLION if self.split == "train" else len(self._pairs()) * len(QUESTIONS)

    def question(self, index: int) -> str:
        return self._texts(index)[0]

    def answer(self, index: int) -> str:
        return self._texts(index)[1]

    def _pairs(self):
        return pairs(self.name, self.creatures, self.world, self.split == "test")

    def _texts(self, index: int) -> tuple[str, str]:
        """Question and answer."""
        if self.split == "test":
            wording, place = divmod(self.check_index(index), len(self._pairs()))
            creature, attribute = self._pairs()[place]
            return QUESTIONS[wording].format(creature.name, attribute), creature.facts[attribute]
        generator = self.generator(index, self.seed)
        if generator.random() < 0.5:
            creature, attribute = pick(generator, self._pairs())
            return pick(generator, QUESTIONS).format(creature.name, attribute), creature.facts[attribute]
        creature = pick(generator, creatures(self.creatures, self.world))
        named = pick_some(generator, tuple(ATTRIBUTES), int(generator.integers(2, len(ATTRIBUTES) + 1)))
        told = ", ".join(f"{attribute} {creature.facts[attribute]}" for attribute in named)
        return f"list {', '.join(named)} of {creature.name}", told

"""What the start model can do: which problems are worth asking, and the budgets of Toggle (K2.5 §3.5, §3.6).

Found out once, before the first update, from `rl.estimate` answers to each problem, and noted in the ledger with the model's
fingerprint, the seed and the number of samples.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from k25_jax.agents.trace import Trace
from k25_jax.config import RLConfig
from k25_jax.rl.advantages import Group, rewards_of
from k25_jax.rl.ledger import Ledger, LedgerError
from k25_jax.rl.problems import Estimate, Problem, asked_in, problems_of, worth_asking

log = logging.getLogger(__name__)


class Start:
    """The problems of a run in their order, with what the start model made of them."""

    def __init__(self, record: Mapping, problems: Sequence[Problem], config: RLConfig, seed: int):
        self._config, self._seed = config, seed
        self._estimates = {key: Estimate(**found) for key, found in record["problems"].items()}
        self.problems = worth_asking(problems, self._estimates, config) if config.estimate else problems
        log.info("%d of %d problems are worth asking", len(self.problems), len(problems))

    def asked_in(self, number: int) -> dict[str, Problem]:
        """The problems of a batch, by the names of their groups."""
        asked = asked_in(number, self.problems, self._config.groups, self._seed)
        return {f"{number:06d}-{place:03d}": problem for place, problem in enumerate(asked)}

    def group(self, problem: Problem, traces: Sequence[Trace]) -> Group:
        """The samples of a problem, with its budget."""
        estimate, percentile = self._estimates.get(problem.key), self._config.toggle.percentile
        tokens = estimate.budget(percentile) if estimate else math.inf
        return Group(problem.key, problem.task.name, problem.ability, tokens, traces)


def find_out(
    ledger: Ledger,
    config: RLConfig,
    seed: int,
    fingerprint: str | None,
    ask: Callable[[Mapping[str, Problem], int], Mapping[str, Sequence[Trace]]],
) -> Start:
    """What is noted of the start model; else `ask(problems by name, samples)` it, and note it.

    `fingerprint` is that of the start model while nothing has been learnt, later None. Raises LedgerError where what is
    noted is missing then, or of another model.
    """
    file, problems, record = f"{ledger.folder}/start.json", problems_of(config), ledger.start()
    if record is None:
        if fingerprint is None:
            raise LedgerError(f"{file} is missing, which only the start model can write; choose another --workdir")
        record = {"model": fingerprint, "seed": seed, "samples": config.estimate, "problems": {}}
        asked = {f"start-{place:06d}": problem for place, problem in enumerate(problems)} if config.estimate else {}
        for name, traces in ask(asked, config.estimate).items():
            record["problems"][asked[name].key] = _estimate(asked[name], traces, config)
        ledger.commit_start(record)
    elif fingerprint not in (None, record["model"]):
        raise LedgerError(
            f"{file} is of the model {record['model']}, this run starts from {fingerprint}; set train.init_from back, or "
            "choose another --workdir"
        )
    return Start(record, problems, config, seed)


def _estimate(problem: Problem, traces: Sequence[Trace], config: RLConfig) -> dict:
    group = Group(problem.key, problem.task.name, problem.ability, math.inf, traces)
    correct = (rewards_of(group, config) >= config.correct).tolist()
    return {"lengths": [trace.length for trace in group.valid], "correct": correct}

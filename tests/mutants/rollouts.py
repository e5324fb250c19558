"""Rollouts as data: advantages, Toggle, the ledger, weights that change."""

from mutants.mutation import of

MUTATIONS = [
    *of(
        "rl/advantages.py",
        (
            "advantages divided by their standard deviation",
            "return rewards - rewards.mean()",
            "return (rewards - rewards.mean()) / (rewards.std() + 1e-6)",
            "rl/test_advantages.py",
        ),
        (
            "infrastructure's failures count as rewards of 0",
            "[trace for trace in self.traces if trace.valid]",
            "list(self.traces)",
            "rl/test_advantages.py",
        ),
    ),
    *of(
        "rl/toggle.py",
        (
            "a percentile one rank too high",
            "/ 100) - 1]",
            "/ 100) - (percentile == 100)]",
            "rl/test_toggle.py",
        ),
        (
            "budgets of all answers, not of the correct ones",
            "if right], percentile)",
            "], percentile)",
            "rl/test_toggle.py",
        ),
        (
            "the phases the other way round",
            "update // config.updates % 2}",
            "1 - update // config.updates % 2}",
            "rl/test_toggle.py",
        ),
        (
            "an unsolved problem is held to its budget",
            "within | unsolved",
            "within & ~unsolved",
            "rl/test_toggle.py",
        ),
    ),
    *of(
        "rl/ledger.py",
        (
            "a group may be committed again",
            "        self._refuse_twice(self._group_file(name))\n",
            "",
            "rl/test_ledger.py",
        ),
        (
            "a group that changed is taken",
            "if self._hash(name) != expected:",
            "if self._hash(name) is None:",
            "rl/test_ledger.py",
        ),
    ),
    *of(
        "rl/source.py",
        (
            "a batch sampled by weights of one update too early",
            "version, record = number * self._config.updates_per_batch, self._ledger.batch(number)",
            "version, record = max(number * self._config.updates_per_batch - 1, 0), self._ledger.batch(number)",
            "rl/test_rl_run.py::test_each_batch_is_sampled_by_the_weights_after_the_last_update_of_the_one_before",
        ),
    ),
    *of(
        "rl/batches.py",
        (
            "advantages stay where too few groups differ",
            "advantage if differing >= config.min_groups else 0.0",
            "advantage",
            "rl/test_advantages.py",
        ),
    ),
    *of(
        "train/step.py",
        (
            "an update without an advantage moves",
            "moves = finite if taught is None else finite & taught",
            "moves = finite",
            "rl/test_rl_step.py",
        ),
    ),
    *of(
        "sampling/engine.py",
        (
            "latents of old weights are read on",
            'if latents == "recompute":',
            'if latents == "again":',
            "sampling/test_versions_and_epochs.py::test_latents_that_are_computed_again_are_of_the_new_weights",
        ),
        (
            "who waits begins with the old weights",
            "            if self._next and not sequence.begun:\n                continue\n",
            "",
            "sampling/test_versions_and_epochs.py::test_answers_are_drained_with_the_weights_that_they_began_with",
        ),
    ),
]

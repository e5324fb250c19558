"""Small faults for tests/mutations.py: what stands in the package, what it becomes, which tests are to notice.

Of each numerical module those that would train, or answer, and be wrong: a mask, an axis, a sign, a factor, a dtype, a sum
that is not taken over all devices. Tests are named as narrowly as can be, since each entry costs their time.
"""

from mutants import agents, data, kernels, models, rewards, rl, rollouts, sampling, training

ALL = models, kernels, training, data, sampling, agents, rl, rollouts, rewards
MUTATIONS = [mutation for part in ALL for mutation in part.MUTATIONS]

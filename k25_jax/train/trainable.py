"""Which parameters a stage trains: the tree split in two by `train.trainable`, and put together again (K2.5 §3.3).

What is frozen is not differentiated, has no optimizer state, and is moved by nothing: not by weight decay, the router's
sign rule or QK-Clip.
"""

import difflib

from flax.traverse_util import flatten_dict, unflatten_dict

from k25_jax.config import ConfigError


def split(tree: dict, names: tuple[str, ...]) -> tuple[dict, dict]:
    """(trained, frozen) of a tree of parameters, or of one like it; each holds only its own leaves.

    `names` are parts of the model ("vision") or paths into one ("moe/attention"); none means all. Raises ConfigError for
    a name that is in no path.
    """
    flat = flatten_dict(tree)
    chosen = [tuple(name.split("/")) for name in names]
    for name, path in zip(names, chosen, strict=True):
        if not any(leaf[: len(path)] == path for leaf in flat):
            known = {"/".join(leaf[:size]) for leaf in flat for size in range(1, len(leaf) + 1)}
            like = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            parts = ", ".join(sorted(tree))
            raise ConfigError(
                f"train.trainable: there are no parameters {name!r}; did you mean {like!r}? The parts are {parts}"
            )
    trained, frozen = {}, {}
    for leaf, value in flat.items():
        is_trained = not chosen or any(leaf[: len(path)] == path for path in chosen)
        (trained if is_trained else frozen)[leaf] = value
    return unflatten_dict(trained), unflatten_dict(frozen)


def merged(trained: dict, frozen: dict) -> dict:
    """The tree that was split."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))

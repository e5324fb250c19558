"""Kill -9 at any moment of a run of the stage rl: every committed group is consumed exactly once."""

import random
import shutil
import time

import pytest

import rollouts
import runs
from k25_jax.config import load_experiment
from k25_jax.train.loop import train


def killed(file, run, kills: int, seed: int) -> int:
    """Take a run to its end, killed so often at random moments on its way; how often it was."""
    rng, done, before = random.Random(seed), 0, {}
    while True:
        process, since = runs.start("train", f"--config={file}", f"--workdir={run}"), rollouts.events(run)
        wait = rng.randint(0, 2)
        alive = runs.wait_for(process, lambda: rollouts.events(run) >= since + wait or done == kills)  # noqa: B023
        if done == kills or not alive:
            out, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
            return done
        time.sleep(rng.random() * 0.4)
        process.kill()
        process.communicate()
        done += 1
        now = rollouts.committed(run)
        assert {name: now.get(name) for name in before} == before, "what is committed stays as it is"
        before = now


def check(tmp_path, kills: int, steps: int, seed: int):
    file, run = rollouts.write_experiment(tmp_path, steps), tmp_path / "run"
    assert killed(file, run, kills, seed) == kills
    rows = runs.rows(run)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["batch"] for row in rows] == [step // 2 for step in range(steps)], "each batch twice, in its order"
    records = rollouts.batches(run)
    assert len(records) == steps // 2 and rows[-1]["tokens_sampled_so_far"] == sum(r["sampled_tokens"] for r in records)
    named = [name for record in records for name in record["groups"]]
    assert len(set(named)) == len(named) == steps // 2 * rollouts.GROUPS
    kept = {file.stem for file in (run / "rl" / "groups").glob("0*.jsonl")}
    assert kept == set(named), "no group was committed and forgotten"
    # Nobody disturbs a run that learns from the same ledger: it must end with the same bits.
    shutil.copytree(run / "rl", tmp_path / "again" / "rl")
    train(load_experiment(str(file)), tmp_path / "again")
    assert rollouts.bits(tmp_path / "again") == rollouts.bits(run)
    assert rollouts.untimed(tmp_path / "again") == rollouts.untimed(run)


@pytest.mark.slow
def test_a_run_that_is_killed_three_times(tmp_path):
    check(tmp_path, kills=3, steps=4, seed=1)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times(tmp_path):
    check(tmp_path, kills=20, steps=20, seed=2)

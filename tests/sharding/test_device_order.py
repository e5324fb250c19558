"""A mesh whose devices come in another order than jax.devices(): two real processes, connected over loopback."""

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import runs

# Process 1 has the first rows; the devices of a process are not next to each other.
PERMUTED = """
import sys
import numpy as np
from k25_jax.cli import main
from k25_jax.sharding import mesh

mesh._near = lambda devices, sizes: np.asarray(devices)[[2, 0, 3, 1]].reshape(sizes)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_data_rows_and_images_follow_the_devices_of_the_mesh(tmp_path):
    """One process on one device, which goes on from a checkpoint of the two, sees the same documents and losses."""
    file = runs.write_experiment(tmp_path)
    settings = ("train.steps=3", "train.checkpoint_every=1", "data.batch_size=4", "data.packs=4", "data.lanes=2")
    command = lambda run: ["train", f"--config={file}", f"--workdir={tmp_path / run}", *settings]  # noqa: E731
    launch = [sys.executable, "launch/local.py", "--processes=2", "--devices-each=2", "--", sys.executable, "-c"]
    done = subprocess.run(
        [*launch, textwrap.dedent(PERMUTED), *command("two")],
        capture_output=True, text=True, env=runs.environment(), cwd=runs.ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "one" / "checkpoints" / str(step))
    alone = runs.k25(*command("one"))
    assert alone.returncode == 0, alone.stderr
    two, one = (runs.untimed(tmp_path / run)[1:] for run in ("two", "one"))
    same = ("step", "tokens", "documents", "clips", "media_tokens", "text_tokens", "vision_tokens")
    assert [[row[name] for name in same] for row in two] == [[row[name] for name in same] for row in one]
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-4)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert sum(row["clips"] for row in one) > 0

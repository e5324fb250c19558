"""Records of rendered tasks, drawn as they are asked for (K2.5 §3.3): milliseconds of one core for each.

The figure is that of the slowest task: the median over 200 records of `record`, with question, pictures and answer, in
the split that takes longer. Test records are composed several times, until they are held out. Beside it, in the same
run, what it takes to read the same pictures from PNG files in memory. With --json one JSON line.
"""

import argparse
import io
import json
import time

import numpy as np
from PIL import Image

from k25_jax.data.tasks import SPLITS, TASKS, make_task
from k25_jax.vision.image import load_image

RECORDS = 200
BOUND = 3.0  # milliseconds


def milliseconds(function, items) -> float:
    """Median time of a call."""
    times = []
    for item in items:
        start = time.perf_counter()
        function(item)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def as_png(picture: np.ndarray) -> bytes:
    """A picture, or the frames of a film side by side."""
    file = io.BytesIO()
    Image.fromarray(np.concatenate(picture, axis=1) if picture.ndim == 4 else picture).save(file, "PNG")
    return file.getvalue()


def measure(name: str) -> dict[str, float]:
    """Milliseconds of a record in each split, and of reading the pictures of one from PNG."""
    out = {}
    for split in SPLITS:
        task = make_task(f"{name}:{split}")
        indices = np.linspace(0, len(task) - 1, RECORDS).astype(int).tolist()
        task.record(indices[1])  # fonts and files are read
        out[split] = milliseconds(task.record, indices)
    files = [[as_png(picture) for picture in task.media(index)] for index in indices[:50]]
    out["png"] = milliseconds(lambda pictures: [load_image(file) for file in pictures], files)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    found = {name: measure(name) for name in TASKS}
    figure = max(max(times["train"], times["test"]) for times in found.values())
    if args.json:
        out = {"name": "task_rendering", "figure": figure, "bound": BOUND, "ok": figure <= BOUND, "tasks": found}
        print(json.dumps(out))
        return
    for name, times in found.items():
        print(f"{name:12s} train {times['train']:.2f} ms, test {times['test']:.2f} ms, from PNG {times['png']:.2f} ms")
    print(f"slowest: {figure:.2f} ms a record, at most {BOUND}")


if __name__ == "__main__":
    main()

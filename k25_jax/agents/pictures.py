"""The tool `ipython` with pictures in it, as zero-vision SFT teaches and asks for it (K2.5 §3.4)."""

from collections.abc import Sequence

import numpy as np

from k25_jax.agents.observation import InfrastructureError
from k25_jax.agents.tools import IPython
from k25_jax.data.tasks.programmed import PREAMBLE


class Pictures(IPython):
    """Python in a sandbox in which `np`, `Image`, `ndimage` and the pictures of this episode, `images`, are there."""

    description = "Run Python. np, Image, ndimage and the pictures, images, are there."
    parameters = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}

    def show(self, pictures: Sequence[np.ndarray]):
        """Begin a new episode with these pictures, uint8 [h, w, 3]; nothing of the last one is left."""
        for i, picture in enumerate(pictures):
            self._sandbox.put(f"{i}.png", picture)
        load = f"images=[np.asarray(Image.open(f'{{i}}.png')) for i in range({len(pictures)})]"
        begun = self._sandbox.run(f"%reset -f\n{PREAMBLE}\n{load}")
        if begun.status != "ok":
            raise InfrastructureError(f"the pictures cannot be loaded in the sandbox: {begun.text}")

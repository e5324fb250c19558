"""The tool `ipython` with pictures in it, as zero-vision SFT teaches and asks for it (K2.5 §3.4)."""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from k25_jax.agents.tools import IPython
from k25_jax.data.tasks.programmed import PREAMBLE
from k25_jax.sandbox.observation import InfrastructureError, Observation


class Pictures(IPython):
    """Python in a sandbox in which `np`, `Image`, `ndimage` and the pictures of this episode, `images`, are there."""

    description = "Run Python. np, Image, ndimage and the pictures, images, are there."
    _laid_out: Sequence[np.ndarray] | None = None
    parameters = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}

    def lay_out(self, pictures: Sequence[np.ndarray]):
        """`show` them when code is next run: a model that runs none keeps no sandbox busy."""
        self._laid_out = pictures

    def call(self, arguments: Mapping) -> Observation:
        """Run `code`, with the pictures that were laid out."""
        if self._laid_out is not None:
            self.show(self._laid_out)
        return super().call(arguments)

    def show(self, pictures: Sequence[np.ndarray]):
        """Begin a new episode with these pictures, uint8 [h, w, 3]; nothing of the last one is left."""
        self._laid_out, file = None, io.BytesIO()
        np.savez(file, *pictures)
        self._sandbox.put("pictures.npz", file.getvalue())
        load = "with np.load('pictures.npz') as file: images=list(file.values())\ndel file"
        begun = self._sandbox.run(f"%reset -f\n{PREAMBLE}\n{load}")
        if begun.status != "ok":
            raise InfrastructureError(f"the pictures cannot be loaded in the sandbox: {begun.text}")

"""What lies where in the engine: its own mesh (expert, tensor), beside the training mesh of the same devices (K2.5 §4).

A request and its pages lie on one device, which alone attends to them. MLA's cache is one latent for all heads, so that
sharing out heads would repeat it; and a request of 262144 tokens takes 20 GB, which a device has beside its weights.
Experts lie over `expert`, and tokens travel to them. Heads, vocabulary, the width of feed-forwards and of each expert lie
over `tensor`, whose devices multiply with their share for the tokens of all of them. No matrix moves.

Every array of a step has a leading axis Z, the devices; for a single one it has length 1, and there is no mesh.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k25_jax.config import ConfigError, K25Config
from k25_jax.models import decoder
from k25_jax.models.k25 import cast, logical_axes
from k25_jax.sharding.mesh import make_mesh
from k25_jax.sharding.rules import ENGINE, ENGINE_AXES, shardings, spec


def tensors(config: K25Config, devices: int) -> list[int]:
    """What `tensor` may be on so many devices, in rising order; the rest of them shares out the experts."""
    text = config.text
    experts, width = (text.moe.experts, text.moe.ffn_dim) if text.moe_layers else (devices, text.ffn_dim)
    sizes = [n for n in range(1, devices + 1) if not devices % n]
    return [n for n in sizes if not (text.heads % n or width % n or experts % (devices // n))]


def engine_mesh(config: K25Config, devices, tensor: int = 0) -> Mesh | None:
    """The engine's mesh over the devices of one slice; None for one device, and for none.

    `tensor` 0 is the least that there may be. ConfigError where experts, heads or widths do not divide.
    """
    devices, able = list(devices or ()), tensors(config, len(devices or ()))
    if len(devices) < 2:
        return None
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        raise ConfigError(
            f"an engine runs in one slice, and the {len(devices)} devices are of several: start one in each"
        )
    if not able or (tensor and tensor not in able):
        text = config.text
        raise ConfigError(
            f"engine.tensor={tensor} on {len(devices)} devices: it must divide text.heads={text.heads} and "
            f"moe.ffn_dim={text.moe.ffn_dim}, and devices / tensor must divide moe.experts={text.moe.experts}; "
            + (f"set it to {' or '.join(map(str, able))}" if able else "use another number of devices")
        )
    tensor = tensor or able[0]
    near = make_mesh(fsdp=tensor, expert=len(devices) // tensor, devices=devices).devices
    return Mesh(near.reshape(tensor, -1).T, ENGINE_AXES)


def devices_of(params) -> list:
    """The devices where parameters lie, in the order of their mesh; none where they are numpy's."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, NamedSharding):
        return list(sharding.mesh.devices.flat)
    return list(sharding.device_set) if sharding is not None else []


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of an engine lie; without a mesh all are on one device."""

    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """The length of the axis Z."""
        return 1 if self.mesh is None else self.mesh.size

    def spread(self, *axes) -> NamedSharding | None:
        """Dimensions over mesh axes, as of a PartitionSpec."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def abstract(self, tree, *axes):
        """Shapes of arrays, laid out over `axes` as far as those divide their dimensions."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._fit(a.shape, axes)), tree)

    def place(self, tree, *axes):
        """Arrays, laid out over `axes` as far as those divide their dimensions."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda a: jax.device_put(a, self._fit(a.shape, axes)), tree)

    def _fit(self, shape, axes) -> NamedSharding | None:
        if self.mesh is None:
            return None
        rules = {axis: axis for axis in axes}
        return NamedSharding(self.mesh, spec(PartitionSpec(*axes[: len(shape)]), shape, self.mesh, rules))

    def weights(self, params, config: K25Config, dtype):
        """Training parameters, wherever they lie, as those of the engine: in `dtype`, each layer on its own; all copies.

        They move from device to device, one array after the other; neither a host nor a device ever holds all of one.
        """
        if self.mesh is None:
            return _on_one_device(params, dtype)
        move = lambda a, to: lambda: jax.device_put(a.astype(to.dtype), to.sharding, may_alias=False)  # noqa: E731
        moves = jax.tree.map(move, params, self._stacked(params, config, dtype))
        moved = decoder.unstack(moves, lambda move: _layers(a := move(), _inner(a.sharding)))
        return jax.tree.map(lambda a: a() if callable(a) else a, moved)

    def abstract_weights(self, shapes, config: K25Config, dtype):
        """`weights` of parameters of these shapes, as shapes with layouts."""
        return decoder.unstack(
            self._stacked(shapes, config, dtype),
            lambda a: [jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=_inner(a.sharding))] * a.shape[0],
        )

    def _stacked(self, shapes, config: K25Config, dtype):
        shapes = jax.eval_shape(lambda p: cast(p, dtype), shapes)
        if self.mesh is None:
            return shapes
        axes = {name: part for name, part in logical_axes(config).items() if name in shapes}
        layouts = shardings(axes, shapes, self.mesh, ENGINE)
        return jax.tree.map(lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), shapes, layouts)


@functools.partial(jax.jit, static_argnames="dtype")
def _on_one_device(params, dtype):
    return decoder.unstack(jax.tree.map(jnp.copy, cast(params, dtype)))  # what is passed through would not be copied


@functools.partial(jax.jit, static_argnames="sharding")
def _layers(a, sharding):
    """The layers of a stack, which is not shared out over them: nothing moves."""
    return [jax.lax.with_sharding_constraint(a[i], sharding) for i in range(len(a))]


def _inner(sharding):
    """The layout of one of a stack's layers."""
    return sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

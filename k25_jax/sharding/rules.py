"""ONE table: logical axis of a parameter or batch -> mesh axes (K2.5 §3.8). Change the layout of the whole model here."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # parameters of the language model
    "layers": None,
    "stages": "pipe",  # the layers of the MoE stack
    "vocab": ("fsdp", "context", "expert"),
    "embed": ("fsdp", "context", "expert"),
    "mlp": None,
    "latent": None,
    "heads": ("fsdp", "context", "expert"),
    "head_dim": None,
    "expert": "expert",
    "expert_embed": ("fsdp", "context"),
    "expert_mlp": None,
    "router_in": None,
    "router_out": None,
    "norm": None,
    # the vision encoder and the projector are replicated
    "vision": None,
    "vision_heads": None,
    "vision_mlp": None,
    # activations
    "batch": ("fsdp", "expert", "pipe"),  # pipe innermost: the rows of a (fsdp, expert) share are its microbatches
    "length": "context",
    "packs": ("pipe", "fsdp", "context", "expert"),
}

# The optimizer's means lie as their parameters do, but those of what is replicated are shared out.
MEANS = RULES | {"vision": ("expert", "pipe", "fsdp", "context"), "vision_mlp": ("fsdp", "expert", "pipe", "context")}

# The engine has a mesh of its own (sampling/layout.py), in which matrices stay and tokens travel.
ENGINE_AXES = ("expert", "tensor")
ENGINE = dict.fromkeys(RULES) | {"expert": "expert"}
ENGINE |= dict.fromkeys(("expert_mlp", "heads", "mlp", "vocab"), "tensor")


def engine_laid(x, *axes):
    """`x` laid out over these axes of the engine's mesh; as it is where that is not the mesh in use (jax.set_mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if "tensor" in mesh.axis_names else x


def spec(axes: PartitionSpec, shape: tuple[int, ...], mesh: Mesh, rules: dict = RULES) -> PartitionSpec:
    """Mesh axes of one array. One that does not divide its dimension, is taken already or has one device is left out."""
    taken: set[str] = set()
    out = []
    for axis, size in zip(tuple(axes) + (None,) * (len(shape) - len(axes)), shape, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(f"logical axis {axis!r} has no rule in sharding/rules.py")
        rule = rules[axis] if axis is not None else None
        names = (rule,) if isinstance(rule, str) else tuple(rule or ())
        names = tuple(n for n in names if mesh.shape.get(n, 1) > 1 and n not in taken)
        while names and size % _product(mesh.shape[n] for n in names):
            names = names[:-1]
        taken.update(names)
        out.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*out)


def shardings(axes_tree, shapes_tree, mesh: Mesh, rules: dict = RULES):
    """NamedShardings of a parameter tree from its logical axes and shapes."""
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(
        lambda axes, a: NamedSharding(mesh, spec(axes, a.shape, mesh, rules)), axes_tree, shapes_tree, is_leaf=is_spec
    )


def batch_shardings(batch, mesh: Mesh):
    """NamedShardings of a `Batch`: rows over all devices, every pack of patches on each device."""
    rows = jax.tree.map(lambda a: NamedSharding(mesh, spec(PartitionSpec("batch", "length"), a.shape, mesh)), batch)
    packs = jax.tree.map(lambda a: NamedSharding(mesh, PartitionSpec()), batch.vision)
    return rows.replace(vision=packs)


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh in use (jax.set_mesh) that share out the rows of a batch, if they divide `rows`.

    Inside a shard_map its own axes are not among them. The engine's mesh has none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" in mesh.axis_names:
        return ()
    axes = tuple(axis for axis in RULES["batch"] if axis in mesh.axis_names and axis not in mesh.manual_axes)
    return () if rows % _product(mesh.shape[axis] for axis in axes) else axes


def _product(numbers) -> int:
    out = 1
    for n in numbers:
        out *= n
    return out

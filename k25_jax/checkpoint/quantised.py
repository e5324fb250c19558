"""Matrices as public checkpoints store them: in floating point, INT4 or FP8 (K2.5 §3.2).

The experts of K2.5 are INT4, all matrices of K2 are FP8. A matrix `x.weight` [rows, columns] is stored in one of the
`ENCODINGS`; `parts` says which tensors hold it:
    ""    x.weight, in floating point
    int4  x.weight_packed: 8 values in an int32, the first in the lowest bits, each with 8 added; x.weight_scale: one
          scale for every 32 values of a row; x.weight_shape: [rows, columns], as a row may not fill its last int32
    fp8   x.weight: E4M3 values; x.weight_scale_inv: one factor for every block of 128 by 128, the last ones ragged
"""

import ml_dtypes
import numpy as np

ENCODINGS = ("", "int4", "fp8")
FLOATS = ("F32", "BF16", "F16")  # as safetensors calls them
GROUP = 32
BLOCK = 128
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = float(ml_dtypes.finfo(FP8).max)


# --------------------------------------------------------------------------------------------------------- encodings
def parts(name: str, shape: tuple[int, ...], encoding: str) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The tensors that hold `name` of `shape`: their dtypes (any of them may be read, the first is written), shapes."""
    if encoding == "int4":
        rows, columns = shape
        return {
            f"{name}_packed": (("I32",), (rows, -(-columns // 8))),
            f"{name}_scale": (("BF16", "F32", "F16"), (rows, -(-columns // GROUP))),
            f"{name}_shape": (("I32", "I64"), (2,)),
        }
    if encoding == "fp8":
        blocks = tuple(-(-size // BLOCK) for size in shape)
        return {name: (("F8_E4M3",), shape), f"{name}_scale_inv": (("F32", "BF16"), blocks)}
    return {name: (FLOATS, shape)}


def encode(weight: np.ndarray, encoding: str) -> tuple[np.ndarray, ...]:
    """The contents of `parts`, in their order. Raises ValueError where a value to quantise is not finite."""
    if not encoding:
        return (weight,)
    if not np.isfinite(weight.astype(np.float32)).all():
        raise ValueError(f"cannot be stored as {encoding}: it holds NaN or infinity")
    return pack_int4(weight) if encoding == "int4" else quantise_fp8(weight)


def unpack_int4(packed: np.ndarray, scale: np.ndarray, shape, group: int = GROUP) -> np.ndarray:
    """INT4 [rows, ceil(columns / 8)] and scales [rows, ceil(columns / group)] -> float32 of `shape`."""
    rows, columns = (int(size) for size in shape)
    pairs = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    values = np.empty((rows, 2 * pairs.shape[1]), np.int8)
    values[:, 0::2] = pairs & 15
    values[:, 1::2] = pairs >> 4
    values = values[:, :columns] - np.int8(8)
    return values * _spread(scale, group, 1, columns)


def pack_int4(weight: np.ndarray, group: int = GROUP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix -> (packed int32, scale bfloat16, shape int32), symmetric: the largest of a group becomes 7 or -7.

    So a group that already holds 4-bit values with such an extreme is stored without loss.
    """
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // group), group), np.float32)
    padded.reshape(rows, -1)[:, :columns] = weight
    scale = (np.abs(padded).max(axis=2) / 7).astype(ml_dtypes.bfloat16)
    scale[scale == 0] = 1
    values = np.clip(np.rint(padded.reshape(rows, -1)[:, :columns] / _spread(scale, group, 1, columns)), -8, 7)
    nibbles = np.zeros((rows, 8 * -(-columns // 8)), np.uint8)
    nibbles[:, :columns] = (values + 8).astype(np.uint8)
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view("<i4")
    return packed, scale, np.array([rows, columns], np.int32)


def dequantise_fp8(weight: np.ndarray, scale_inv: np.ndarray) -> np.ndarray:
    """E4M3 [rows, columns] and the factor of each 128x128 block -> float32."""
    rows, columns = weight.shape
    return weight.astype(np.float32) * _spread(_spread(scale_inv, BLOCK, 0, rows), BLOCK, 1, columns)


def quantise_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix -> (E4M3 values, float32 factors of its 128x128 blocks): the largest of a block becomes 448."""
    rows, columns = weight.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = np.zeros((down * BLOCK, across * BLOCK), np.float32)
    padded[:rows, :columns] = weight
    scale = np.abs(padded).reshape(down, BLOCK, across, BLOCK).max(axis=(1, 3)) / np.float32(FP8_MAX)
    scale[scale == 0] = 1
    values = padded[:rows, :columns] / _spread(_spread(scale, BLOCK, 0, rows), BLOCK, 1, columns)
    return np.clip(values, -FP8_MAX, FP8_MAX).astype(FP8), scale


def _spread(scale: np.ndarray, size: int, axis: int, length: int) -> np.ndarray:
    """Each scale repeated for the `size` values that share it, cut to `length`; float32."""
    repeated = np.repeat(scale.astype(np.float32), size, axis)
    return repeated[:length] if axis == 0 else repeated[:, :length]


def describe(encoding: str) -> dict:
    """The `quantization_config` that tells other software about the tensors of an encoding."""
    others = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    others += ["re:.*vision_tower.*", "re:.*mm_projector.*"]
    if encoding == "fp8":
        kept = ["lm_head", "vision_tower", "mm_projector"]
        scheme = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        return scheme | {"weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": kept}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    scheme = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return scheme | {"config_groups": {"group_0": group}, "ignore": others}

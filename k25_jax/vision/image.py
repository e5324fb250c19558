"""Images from files or bytes to RGB arrays, and from RGB arrays to patches (K2.5 §3.2).

Everything that Pillow may do with hostile or damaged bytes ends in an `ImageError`, and no global setting of Pillow is
touched. Only Pillow's own calls are guarded so: a mistake in the code here comes out as what it is.
"""

import io
import math
import os
import stat
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import tensorstore
from PIL import Image, UnidentifiedImageError

from k25_jax.config import VisionConfig
from k25_jax.runtime.paths import AnyPath, is_remote, open_random, size_and_time, to_path
from k25_jax.vision.cost import too_costly
from k25_jax.vision.orientation import turn
from k25_jax.vision.patchpack import Clip

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # the decoders tried; no EPS, PDF, PSD, ..
MAX_PIXELS = 2**27
MOST_BYTES = 2**30  # of a file: what `MAX_PIXELS` take with 16 bits and alpha
_ORIENTATION = 0x0112  # EXIF tag
_PHOTOMETRIC = 262  # TIFF tag; 0: white is zero
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PLAIN_CHUNKS = (b"IHDR", b"IDAT", b"IEND", b"sRGB", b"gAMA", b"cHRM", b"pHYs", b"sBIT", b"tIME", b"bKGD", b"iCCP")


class ImageError(ValueError):
    """An image that cannot be used; the message names the file, the reason and the remedy."""


# -------------------------------------------------------------------------------------------------------------- reading
def source_name(source: str | AnyPath | bytes) -> str:
    """What errors call a source that came without a name: its path, or the number of its bytes."""
    return f"<{len(source)} bytes>" if isinstance(source, (bytes, bytearray, memoryview)) else str(source)[:300]


def open_source(source: str | AnyPath | bytes, name: str, error: type[ValueError]) -> BinaryIO:
    """A binary file object over a regular file or bytes; raises `error` when it is missing, not a file, or empty."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        file, size = io.BytesIO(source), len(source)
    else:
        try:
            file, size = _opened(source)
        except FileNotFoundError:
            raise error(f"{name}: there is no such file; check the path") from None
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", problem)
            raise error(f"{name}: cannot be read ({reason}); check the path and its permissions") from problem
        if file is None:
            raise error(f"{name}: is not a regular file; give the path of one")
    if not size:
        file.close()
        raise error(f"{name}: is empty (0 bytes); fetch it again or drop the record")
    return file


def _opened(source: str | AnyPath) -> tuple[BinaryIO | None, int]:
    """A file object, or None where it is no regular file; and its bytes."""
    if is_remote(source):
        path = to_path(source)
        return open_random(path), size_and_time(path)[0]
    status = os.stat(source)
    return open(source, "rb") if stat.S_ISREG(status.st_mode) else None, status.st_size


def load_image(source: str | AnyPath | bytes, max_pixels: int = MAX_PIXELS, name: str = "") -> np.ndarray:
    """Decode an image (PNG, JPEG, WebP, GIF, BMP, TIFF; the first frame) to uint8 RGB [h, w, 3].

    The EXIF orientation is applied; an EXIF block that cannot be read counts as upright. Transparent pixels are
    composited over white. 16-bit greyscale is scaled by 1/257. Colour profiles are ignored. What it will cost is checked
    before anything is decoded: `max_pixels` in the header, the rest by `too_costly`. `name` stands for the source in errors;
    by default its path. Raises ImageError.
    """
    name = name or source_name(source)
    with open_source(source, name, ImageError) as file:
        data = file.read(MOST_BYTES + 1)
        if reason := f"more than {MOST_BYTES} bytes; scale it down" if len(data) > MOST_BYTES else too_costly(data):
            raise ImageError(f"{name}: {reason}, or drop the record")
        file.seek(0)
        with _pillow(name):
            image = Image.open(file, formats=FORMATS)
        with image:
            check_pixels(image.width, image.height, max_pixels, name, ImageError)
            if (rgb := _plain_png(data)) is not None:
                return rgb
            with _pillow(name):
                image.load()
            return turn(to_rgb(image, name), _orientation(image))


@contextmanager
def _pillow(name: str):
    """Around one call of Pillow: whatever it raises of damaged bytes becomes an ImageError."""
    try:
        yield
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: is not an image of a known format ({', '.join(FORMATS)}), or its header is damaged; convert "
            "it, fetch it again, or drop the record"
        ) from None
    except Image.DecompressionBombError as problem:
        raise ImageError(f"{name}: {problem}; scale the image down or drop the record") from problem
    except Exception as problem:  # decoders of damaged bytes raise nearly every type there is
        raise ImageError(
            f"{name}: cannot be decoded ({type(problem).__name__}: {problem}); fetch it again or drop the record"
        ) from problem


def _plain_png(data: bytes) -> np.ndarray | None:
    """The pixels of an 8-bit RGB PNG without transparency, orientation or interlacing, from a decoder that takes half of
    Pillow's time; None for all other files, and for those that it refuses.
    """
    plain = (
        data.startswith(_PNG) and data[24:26] == b"\x08\x02" and data[28:29] == b"\0"
    )  # bits, colour type, interlacing
    if not plain or not _has_plain_chunks(data):
        return None
    try:
        context = tensorstore.Context()
        tensorstore.KvStore.open({"driver": "memory"}, context=context).result()["png"] = data
        spec = {"driver": "png", "kvstore": {"driver": "memory", "path": "png"}}
        rgb = tensorstore.open(spec, context=context, read=True).result().read().result()
    except ValueError:
        return None  # damaged: Pillow says how
    return rgb if rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3 else None


def _has_plain_chunks(data: bytes) -> bool:
    """Whether a PNG holds no chunk that changes its pixels or turns them."""
    place = len(_PNG) - 8
    while place + 12 <= len(data):
        kind = data[place + 4 : place + 8]
        note = kind == b"tEXt" and not data.startswith((b"Raw profile", b"XML"), place + 8)  # these hold an orientation
        if kind not in _PLAIN_CHUNKS and not note:
            return False
        place += 12 + int.from_bytes(data[place : place + 4])
    return True


def check_pixels(width: int, height: int, max_pixels: int, name: str, error: type[ValueError]):
    """Raise `error` when a picture of this size has more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise error(
            f"{name}: {width} x {height} pixels exceed the limit of {max_pixels}; scale it down or raise max_pixels"
        )


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """The pixels of a loaded Pillow image of any mode as uint8 RGB [h, w, 3], over white; raises ImageError."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _grey16_to_rgb(image)
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: 32-bit greyscale has no fixed range of brightness; save it with 8 or 16 bits")
    if image.has_transparency_data:
        with _pillow(name):
            image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        with _pillow(name):
            image = image.convert("RGB")
    return np.array(image)


def _grey16_to_rgb(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image).astype(np.uint32)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:
        grey = 65535 - grey  # Pillow inverts such files at 8 bits but not at 16
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[grey == transparent] = 65535
    grey = ((grey + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of a loaded image; 1 when there is none or it cannot be read."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


# -------------------------------------------------------------------------------------------------------------- patches
def target_size(
    height: int, width: int, max_patches: int = 16384, max_side: int = 512, patch: int = 14, merge: int = 2
) -> tuple[tuple[int, int], tuple[int, int]]:
    """((new height, new width), (padded height, padded width)) in pixels, as the public image processor (K2.5 §3.2).

    An image is never enlarged. `max_side` counts patches. The budget is held against whole patches before padding, so
    the padded grid can exceed `max_patches` a little: 130 x 130 = 16900 for an image of 1805 x 1805. Raises ImageError.
    """
    if height < 1 or width < 1:
        raise ImageError(f"an image of {height} x {width} pixels has no patches; drop the record")
    limit = max_side * patch
    whole = max(1, height // patch) * max(1, width // patch)
    scale = min(1.0, math.sqrt(max_patches / whole), limit / height, limit / width)
    size = (min(limit, max(1, int(height * scale))), min(limit, max(1, int(width * scale))))
    unit = patch * merge
    return size, (math.ceil(size[0] / unit) * unit, math.ceil(size[1] / unit) * unit)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, antialiased resize of uint8 [h, w, 3]."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def patchify(image: np.ndarray, config: VisionConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """Pad uint8 [h, w, 3] with zeros at the right and bottom to whole groups of patches, and cut it.

    Returns patches uint8 [rows * columns, 3 * patch * patch] in raster order, values by channel, row, column; and the
    grid (rows, columns).
    """
    patch = config.patch_size
    rows, columns = (
        math.ceil(side / (patch * merge)) * merge for side, merge in zip(image.shape[:2], config.merge, strict=True)
    )
    if image.shape[:2] != (rows * patch, columns * patch):
        padded = np.zeros((rows * patch, columns * patch, 3), np.uint8)
        padded[: image.shape[0], : image.shape[1]] = image
        image = padded
    cut = image.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return cut.reshape(rows * columns, config.patch_dim), (rows, columns)


def unpatchify(clip: Clip) -> np.ndarray:
    """The frames that a clip was cut from, uint8 [t, h, w, 3], with the padding of whole groups; the inverse of `patchify`.

    Raises ImageError where the patches are no pixels.
    """
    (frames, rows, columns), patch = clip.grid, math.isqrt(clip.patches.shape[1] // 3)
    if clip.patches.dtype != np.uint8 or clip.patches.shape[1] != 3 * patch**2:
        kind = f"{clip.patches.shape[1]} values of {clip.patches.dtype}"
        raise ImageError(f"{clip.source}: patches of {kind} cannot be turned back into pixels; give uint8 RGB")
    cut = clip.patches.reshape(frames, rows, columns, 3, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return cut.reshape(frames, rows * patch, columns * patch, 3)


def preprocess(image: np.ndarray, config: VisionConfig, max_patches: int = 16384, source: str = "image") -> Clip:
    """Resize, pad and cut one uint8 RGB image [h, w, 3] to a clip of one frame (K2.5 §3.2); raises ImageError."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ImageError(f"{source}: expected uint8 [h, w, 3], not {image.dtype} {image.shape}; use load_image")
    (height, width), _ = target_size(*image.shape[:2], max_patches, patch=config.patch_size)
    patches, grid = patchify(resize(image, height, width), config)
    return Clip(patches, (1, *grid), source, config.merge)


def normalise(patches: np.ndarray) -> np.ndarray:
    """uint8 pixels to float32 in [-1, 1]: mean 0.5 and standard deviation 0.5 of values in [0, 1]."""
    return (patches.astype(np.float32) / 255 - 0.5) / 0.5

"""Image files, uint8 pixels and [-1, 1]: the only place that knows them. NumPy and Pillow alone.

Axes: H W pixels of a file, h w pixels of a model, C channels. uint8 pixels are [H, W, 3] or [H, W].
"""

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from .errors import DataError, ModelError
from .files import whole

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
# Depths that cameras and microscopes store in files of 16 bits.
BIT_DEPTHS = (8, 10, 12, 14, 16)
INK, FRAME = (64, 64, 64), (208, 208, 208)
# What Pillow raises on damaged files, beside OSError.
DAMAGED = (
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)


class _Silence:
    """Mute Pillow's warnings while any thread reads: threads share one list of warning filters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._filters.__exit__(None, None, None)


_SILENCE = _Silence()


def is_image(path: Path) -> bool:
    """Say whether a name ends like an image that can be read; hidden files never do."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def find_images(folder: Path) -> list[Path]:
    """List the images of a folder and its sub-folders, sorted; what is hidden is skipped.

    Raises: DataError if the folder does not exist.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}: give a folder of images ({', '.join(EXTENSIONS)}).")
    return sorted(
        path
        for path in folder.rglob("*")
        if is_image(path)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def read_image(path: Path) -> Pixels:
    """Read the first frame of an image file as upright RGB.

    Transparent images are laid on white, or on black where on white nothing at all would be seen.
    16-bit gray is scaled by the least of 8, 10, 12, 14 and 16 bits that holds its greatest value.
    32-bit gray keeps values in 0..255 (whole numbers) or 0..1 (real numbers); other ranges are
    stretched from least to greatest, and what is not finite counts as the least.

    Shapes: uint8 [H, W, 3].
    Raises: DataError if the file is missing, empty, damaged, of another kind, or too large.
    """
    with _opened(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode == "F" or image.mode.startswith("I"):
            return np.repeat(_depth_to_uint8(np.asarray(image))[..., None], 3, axis=-1)
        if not image.has_transparency_data:
            return np.array(image.convert("RGB"))
        return _without_alpha(image.convert("RGBA"))


def image_size(path: Path) -> tuple[int, int]:
    """Give (height, width) of the upright image; pixels are decoded only if PNG or turned.

    Raises: DataError as `read_image` does.
    """
    with _opened(path) as file:
        is_turned = file.getexif().get(ExifTags.Base.Orientation, 1) > 4
        image = ImageOps.exif_transpose(file) if is_turned else file
        return image.height, image.width


def to_model(pixels: Pixels, size: tuple[int, int]) -> Floats:
    """Resize pixels to the size of a model, antialiased, and scale them to [-1, 1].

    Shapes: pixels uint8 [H, W, 3]; size (h, w); result float32 [3, h, w].
    """
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    values: Floats = np.clip(resize(planes / 127.5 - 1, size), -1, 1)
    return values


def from_model(values: Floats, size: tuple[int, int]) -> Floats:
    """Resize a model's answer to the size of an image and clip it to [-1, 1].

    Shapes: values [3, h, w]; size (H, W); result float32 [H, W, 3].
    Raises: ModelError if a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ModelError(
            "the model answered with values that are not finite. "
            "Export it again in fp32, or train with a lower learning rate."
        )
    clipped: Floats = np.clip(resize(values, size).transpose(1, 2, 0), -1, 1)
    return clipped


def resize(planes: Floats, size: tuple[int, int]) -> Floats:
    """Resize planes by cubic interpolation, antialiased where they shrink; results may overshoot.

    Shapes: planes [C, H, W]; size (h, w); result float32 [C, h, w].
    """
    planes = np.asarray(planes, dtype=np.float32)
    if planes.shape[1:] == tuple(size):
        return planes
    height, width = size
    resized = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        for plane in planes
    ]
    return np.stack(resized)


def to_uint8(values: Floats) -> Pixels:
    """Turn [-1, 1] into 0..255, rounded; values beyond are clipped. Shapes: any."""
    pixels: Pixels = np.rint(np.clip(values, -1, 1) * 127.5 + 127.5).astype(np.uint8)
    return pixels


def write_image(path: Path, pixels: Pixels) -> None:
    """Write pixels as PNG, whole or not at all; missing folders are made.

    Shapes: uint8 [H, W] or [H, W, 3].
    Raises: DataError if the name is not .png or the file cannot be written, as on a full disk.
    """
    if path.suffix.lower() != ".png":
        raise DataError(f"{path}: images are written as PNG. Give a name that ends in .png.")
    with whole(path) as part:
        Image.fromarray(pixels).save(part, "PNG")


def with_channels(pixels: Pixels) -> Pixels:
    """Give a picture of one channel three equal ones. Shapes: [H, W] or [H, W, 3] -> [H, W, 3]."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)


def montage(
    rows: Sequence[Sequence[Pixels]],
    *,
    headings: Sequence[str] = (),
    cell: int | None = None,
    gap: int = 6,
) -> Pixels:
    """Lay images out in rows on white, with thin gaps and a heading over each column.

    Every image is fitted into a cell of the shape of the first one; `cell` is the longest side of
    a cell in pixels (default: as the first image).

    Shapes: images uint8 [H, W] or [H, W, 3]; result uint8 [H', W', 3].
    Raises: ValueError if there is no image, or not one heading to each column.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns or not rows[0]:
        raise ValueError("a montage needs at least one image, in its first row")
    if headings and len(headings) != columns:
        raise ValueError(f"{len(headings)} headings do not fit {columns} columns")
    height, width = _fitted(rows[0][0].shape[:2], (cell, cell) if cell else rows[0][0].shape[:2])
    title = _title_height(width) if headings else 0
    shape = (columns * (width + gap) + gap, title + len(rows) * (height + gap) + gap)
    sheet = Image.new("RGB", shape, "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            image = Image.fromarray(pixels).convert("RGB")
            h, w = _fitted(pixels.shape[:2], (height, width))
            left = gap + j * (width + gap) + (width - w) // 2
            top = title + gap + i * (height + gap) + (height - h) // 2
            # A frame keeps white pictures from running into the paper.
            draw.rectangle((left - 1, top - 1, left + w, top + h), outline=FRAME)
            sheet.paste(image.resize((w, h), Image.Resampling.LANCZOS), (left, top))
    for j, heading in enumerate(headings):
        _write_heading(sheet, heading, (gap + j * (width + gap), gap, width, title))
    return np.array(sheet)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image without warnings; whatever goes wrong inside becomes a DataError."""
    try:
        with _SILENCE, Image.open(path, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        is_empty = path.stat().st_size == 0
        cause = "the file is empty" if is_empty else "it is no PNG, JPEG, WebP, BMP or TIFF image"
        raise DataError(f"{path}: {cause}. Convert it to PNG or remove it.") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}).") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: too large to read ({error}). Cut it into tiles.") from error
    except (OSError, *DAMAGED) as error:
        cause = str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({cause}). Save it again or remove it.") from error


def _depth_to_uint8(values: NDArray[np.generic]) -> Pixels:
    """Scale 16- and 32-bit gray to 0..255, as `read_image` says."""
    is_16_bit, is_real = values.dtype.itemsize == 2, values.dtype.kind == "f"
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    low, high = (numbers[finite].min(), numbers[finite].max()) if finite.any() else (0.0, 0.0)
    if is_16_bit:
        low, high = 0.0, next(2.0**bits - 1 for bits in BIT_DEPTHS if high < 2**bits)
    elif low >= 0 and high <= (1 if is_real else 255):
        low, high = 0.0, 1.0 if is_real else 255.0
    numbers = np.where(finite, numbers, low)
    return np.rint((numbers - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)


def _without_alpha(image: Image.Image) -> Pixels:
    """Lay an RGBA image on white, or on black where white would leave nothing to see."""
    on_white, on_black = (
        np.array(Image.alpha_composite(Image.new("RGBA", image.size, paper), image).convert("RGB"))
        for paper in ("white", "black")
    )
    return on_black if on_white.min() == 255 else on_white


def _fitted(shape: tuple[int, ...], box: tuple[int, ...]) -> tuple[int, int]:
    """Give the largest (height, width) of this shape that fits into a box."""
    scale = min(box[0] / shape[0], box[1] / shape[1])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _title_height(width: int) -> int:
    return max(16, width // 6)


def _write_heading(sheet: Image.Image, text: str, box: tuple[int, int, int, int]) -> None:
    """Write one heading into the middle of a box (left, top, width, height), as large as fits."""
    left, top, width, height = box
    draw = ImageDraw.Draw(sheet)
    font_size = 0.62 * height
    length = draw.textlength(text, font=ImageFont.load_default(font_size))
    font = ImageFont.load_default(font_size * min(1, width / max(length, 1)))
    draw.text((left + width / 2, top + height / 2), text, fill=INK, font=font, anchor="mm")

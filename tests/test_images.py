"""References: pixels made by hand, closed forms of resizing, lossless files that come back."""

import errno
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from fewshot_rt import files
from fewshot_rt.errors import DataError, ModelError
from fewshot_rt.images import (
    find_images,
    from_model,
    image_size,
    montage,
    read_image,
    resize,
    to_model,
    to_uint8,
    write_image,
)

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def gray(values: list[list[int]]) -> np.ndarray:
    return np.repeat(np.array(values, np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff", ".webp"])
def test_lossless_files_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == ".webp" else {}
    path = saved(tmp_path / f"a{suffix}", PICTURE, **options)
    np.testing.assert_array_equal(read_image(path), PICTURE)
    assert image_size(path) == (5, 7)


def test_palette_one_bit_and_gray_alpha(tmp_path: Path) -> None:
    levels = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    palette = Image.frombytes("P", (3, 2), (levels // 255).tobytes())
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "p.png")
    expected = np.where(levels[..., None] > 0, [200, 100, 50], [10, 20, 30])
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), expected)
    Image.fromarray(levels).convert("1").save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_image(tmp_path / "1.png"), gray(levels.tolist()))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    read = read_image(saved(tmp_path / "a.png", pixels))
    # 51 / 255 = 0.2 of black on white leaves 0.8 of 255.
    np.testing.assert_array_equal(read, [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]])
    palette = Image.frombytes("P", (2, 1), bytes([0, 1]))
    palette.putpalette([9, 9, 9, 5, 5, 5])
    palette.save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), gray([[255, 5]]))


def test_white_on_nothing_lies_on_black(tmp_path: Path) -> None:
    Image.frombytes("LA", (2, 1), bytes([255, 255, 255, 0])).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), gray([[255, 0]]))


@pytest.mark.parametrize(
    ("greatest", "full"),
    [(65535, 65535), (16384, 65535), (16383, 16383), (4095, 4095), (1023, 1023), (255, 255)],
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray_is_scaled_by_its_depth(
    tmp_path: Path, greatest: int, full: int, suffix: str
) -> None:
    values = np.array([[0, greatest // 3, greatest]], np.uint16)
    read = read_image(saved(tmp_path / f"a{suffix}", values))
    np.testing.assert_array_equal(read, gray(np.rint(values / full * 255).tolist()))


def test_32_bit_gray(tmp_path: Path) -> None:
    stretched = np.array([[-2.0, 0.0, 3.0, np.nan]], np.float32)
    read = read_image(saved(tmp_path / "f.tif", stretched))
    np.testing.assert_array_equal(read, gray([[0, 102, 255, 0]]))
    read = read_image(saved(tmp_path / "unit.tif", np.array([[0.2, 1.0]], np.float32)))
    np.testing.assert_array_equal(read, gray([[51, 255]]))
    read = read_image(saved(tmp_path / "i.tif", np.array([[-1000, 0, 1000]], np.int32)))
    np.testing.assert_array_equal(read, gray([[0, 128, 255]]))
    read = read_image(saved(tmp_path / "labels.tif", np.array([[0, 1, 2]], np.int32)))
    np.testing.assert_array_equal(read, gray([[0, 1, 2]]))


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (2, 1), (255, 0, 0, 0)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").tolist() == [[[0, 255, 255]] * 2]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_exif_rotation(tmp_path: Path, suffix: str) -> None:
    flat = np.zeros((8, 16, 3), np.uint8)
    flat[:, 8:] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # shown after a quarter turn clockwise
    path = saved(tmp_path / f"a{suffix}", flat, exif=exif)
    upright = read_image(path)
    assert upright.shape == (16, 8, 3)
    assert image_size(path) == (16, 8)
    np.testing.assert_allclose(upright, np.rot90(flat, -1), atol=3)


def test_only_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("L", (3, 2), level) for level in (10, 200)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), gray([[10] * 3] * 2))


@pytest.mark.parametrize("read", [read_image, image_size])
def test_empty_foreign_and_missing_files(tmp_path: Path, read) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    for name, cause in [
        ("empty.png", "file is empty"),
        ("text.png", "no PNG, JPEG"),
        ("missing.png", "No such file"),
        ("folder.png", "directory"),
    ]:
        with pytest.raises(DataError, match=f"{name}.*{cause}"):
            read(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.9])
def test_truncated_files_are_data_errors(tmp_path: Path, suffix: str, kept: float) -> None:
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"a{suffix}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=f"a{suffix}: .*(cannot be read|it is no)"):
        read_image(path)


def test_flipped_bytes_give_an_image_or_a_data_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for suffix in (".png", ".jpg", ".tif", ".webp", ".bmp"):
        content = saved(tmp_path / f"a{suffix}", PICTURE).read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            for at in rng.integers(0, len(damaged), 3):
                damaged[at] = rng.integers(0, 256)
            path = tmp_path / f"b{suffix}"
            path.write_bytes(damaged)
            try:
                assert read_image(path).dtype == np.uint8
            except DataError:
                continue


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", np.zeros((10, 10), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    assert read_image(path).shape == (10, 10, 3)  # Pillow only warns, which stays silent
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(DataError, match=r"a\.png: too large"):
        read_image(path)


def test_warnings_stay_silent_in_threads_and_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.png", np.zeros((10, 10), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    before = list(warnings.filters)
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(20):
                read_image(path)
        except Warning as warning:
            failures.append(warning)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(warnings.filters) == before


def test_find_images(tmp_path: Path) -> None:
    kept = ["b.JPG", "a.png", "sub/c.Tiff", "sub/deep/d.webp"]
    for name in [*kept, "notes.txt", ".hidden.png", ".cache/e.png", "sub/.part-1.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert find_images(tmp_path) == [tmp_path / name for name in sorted(kept)]
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "none")
    with pytest.raises(DataError, match="is a file"):
        find_images(tmp_path / "a.png")


def test_model_values_and_back_are_exact_at_one_size() -> None:
    values = to_model(PICTURE, (5, 7))
    assert values.dtype == np.float32
    assert values.shape == (3, 5, 7)
    np.testing.assert_allclose(values, PICTURE.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(to_uint8(from_model(values, (5, 7))), PICTURE)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = to_model(stripes, (16, 16))
    # The mean of black and white is 0; a nearest pixel would give -1 or 1.
    np.testing.assert_allclose(small[:, 2:-2, 2:-2], 0, atol=0.02)


def test_resizing_keeps_means_and_ramps() -> None:
    ramp = np.linspace(-1, 1, 33, dtype=np.float32) * np.ones((3, 17, 1), np.float32)
    large = from_model(ramp, (34, 66))
    middle = (np.arange(66) + 0.5) / 2 - 0.5
    expected = middle / 16 - 1
    np.testing.assert_allclose(large[5, 4:-4, 0], expected[4:-4], atol=1e-5)
    assert resize(ramp, (1, 1)).shape == (3, 1, 1)
    assert abs(large).max() <= 1


def test_answers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        from_model(np.full((3, 2, 2), np.nan, np.float32), (4, 4))


def test_to_uint8_ends_middle_and_beyond() -> None:
    values = np.array([-3, -1, 0, 1, 3], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("pixels", [PICTURE, PICTURE[..., 0], PICTURE[:1, :1]])
def test_written_images_come_back(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "new" / "a.png"
    write_image(path, pixels)
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    write_image(path, PICTURE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(DataError, match="disk is full"):
        write_image(path, PICTURE[::-1])
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(read_image(path), PICTURE)


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / "a.png", PICTURE)
    assert not list(tmp_path.iterdir())


def test_only_png_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in \.png"):
        write_image(tmp_path / "a.jpg", PICTURE)


def test_montage_places_every_image_and_heading() -> None:
    red, blue = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = montage([[red, blue], [blue, np.full((8, 8), 7, np.uint8)]], gap=3)
    assert sheet.shape == (25, 25, 3)
    np.testing.assert_array_equal(sheet[3:11, 3:11], red)
    np.testing.assert_array_equal(sheet[3:11, 14:22], blue)
    np.testing.assert_array_equal(sheet[14:22, 14:22], 7)
    assert (sheet[0] == 255).all()
    titled = montage([[red, blue]], headings=("input", "answer"), cell=64, gap=4)
    assert titled[:20].min() < 128  # ink
    assert (titled[:, :3] == 255).all()


def test_montage_fits_other_sizes_and_checks_its_arguments() -> None:
    wide = np.zeros((4, 16), np.uint8)
    sheet = montage([[np.zeros((8, 8), np.uint8), wide]], gap=2)
    assert sheet.shape == (12, 22, 3)
    assert (sheet[5:7, 12:20] == 0).all()
    with pytest.raises(ValueError, match="1 headings do not fit 2 columns"):
        montage([[wide, wide]], headings=("a",))
    with pytest.raises(ValueError, match="at least one image"):
        montage([])

"""References: pixels made by hand, files that come back, and real JPEG files and photographs."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from fewshot_rt.codecs import CODECS, Codec, infer_codec
from fewshot_rt.errors import ConfigError, DataError, ModelError
from fewshot_rt.images import to_model

DISC = np.hypot(*np.mgrid[-24:24, -24:24]) < 15
VOC = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
QUARTERS = np.kron(np.array([[0, 1], [2, 3]]), np.ones((9, 7), int))


def rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=quality)
    return np.asarray(Image.open(content).convert("RGB"))


@pytest.mark.parametrize(
    "levels", [(0, 1), (0, 255), (255, 254), ((9, 9, 9), (250, 40, 3)), ((0, 0, 255), (0, 255, 0))]
)
def test_masks_of_any_two_levels(levels: tuple) -> None:
    pixels = np.array(levels, np.uint8)[DISC.astype(int)]
    pixels = pixels if pixels.ndim == 3 else rgb(pixels)
    codec = infer_codec([pixels])
    assert codec.name == "mask"
    brighter_is_second = sum(np.atleast_1d(levels[1])) > sum(np.atleast_1d(levels[0]))
    foreground = DISC if brighter_is_second or levels[1] == (0, 255, 0) else ~DISC
    np.testing.assert_array_equal(codec.paint(pixels), rgb(foreground * 255))
    np.testing.assert_array_equal(codec.values(pixels), foreground)
    answer = codec.decode(to_model(codec.paint(pixels), (48, 48)), (48, 48))
    assert answer.ndim == (2 if codec.is_gray else 3)
    np.testing.assert_array_equal(answer if answer.ndim == 3 else rgb(answer), pixels)
    np.testing.assert_array_equal(codec.values(answer), foreground)


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
@pytest.mark.parametrize("colour", [(255, 255, 255), (40, 255, 126)])
def test_masks_saved_as_jpeg(quality: int, colour: tuple[int, int, int]) -> None:
    disc = np.hypot(*np.mgrid[-48:48, -48:48]) < 30
    pixels = jpeg(
        np.where(disc[..., None], np.array(colour, np.uint8), 0).astype(np.uint8), quality
    )
    assert len(np.unique(pixels)) > 12
    codec = infer_codec([pixels])
    assert codec.name == "mask"
    assert np.mean(codec.values(pixels) != disc) < 0.01


def test_an_empty_mask_among_others_stays_empty() -> None:
    full, empty = rgb(DISC * 255), rgb(DISC * 0)
    codec = infer_codec([empty, full])
    assert not codec.values(empty).any()
    assert not codec.paint(empty).any()


@pytest.mark.parametrize(
    ("photograph", "name"),
    [
        ("moon", "gray"),
        ("clock", "gray"),
        ("text", "gray"),
        ("page", "gray"),
        ("cell", "gray"),
        ("astronaut", "rgb"),
    ],
)
def test_photographs_are_no_masks(photograph: str, name: str) -> None:
    assert infer_codec([getattr(data, photograph)()]).name == name


def test_labels_are_the_exact_colours_from_dark_to_bright() -> None:
    pixels = np.array(VOC, np.uint8)[QUARTERS]
    codec = infer_codec([pixels[:9], pixels])
    assert codec == Codec("labels", ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)))
    np.testing.assert_array_equal(codec.values(pixels), QUARTERS)
    shown = codec.paint(pixels)
    flat = np.unique(shown.reshape(-1, 3), axis=0).astype(int)
    apart = np.abs(flat[:, None] - flat).max(axis=-1)[~np.eye(4, dtype=bool)]
    assert apart.min() == 255


@pytest.mark.parametrize("colours", [VOC, tuple((n, n, n) for n in range(12))])
def test_labels_come_back_at_any_size_without_new_classes(colours: tuple) -> None:
    count = len(colours)
    bands = np.arange(64) * count // 64 * np.ones((64, 1), int)
    codec = Codec("labels", colours)
    pixels = np.array(colours, np.uint8)[bands]
    answer = codec.decode(to_model(codec.paint(pixels), (64, 64)), (131, 197))
    assert answer.shape == ((131, 197) if codec.is_gray else (131, 197, 3))
    classes = codec.values(answer)
    np.testing.assert_array_equal(classes, np.broadcast_to(classes[0], classes.shape))
    # Left to right, no class stands between two that touch.
    np.testing.assert_array_equal(np.flatnonzero(np.diff(classes[0]) != 0).size, count - 1)
    edges = (np.arange(197) + 0.5) / 197 * 64
    assert np.mean(classes[0] != (edges.astype(int) * count // 64)) < 0.05


def test_many_labels_are_far_apart() -> None:
    colours = tuple((n, 0, 0) for n in range(64))
    codec = Codec("labels", colours)
    pixels = np.array(colours, np.uint8)[None]
    shown = codec.paint(pixels)[0].astype(int)
    distance = np.sqrt(np.square(shown[:, None] - shown).sum(axis=-1))
    assert distance[~np.eye(64, dtype=bool)].min() >= 64
    answer = codec.decode(to_model(codec.paint(pixels), (1, 64)), (1, 64))
    np.testing.assert_array_equal(answer, pixels)


def test_gray_and_rgb() -> None:
    ramp = rgb(np.arange(256).reshape(16, 16))
    gray = infer_codec([ramp])
    assert gray == Codec("gray")
    np.testing.assert_array_equal(gray.paint(ramp), ramp)
    np.testing.assert_array_equal(gray.decode(to_model(ramp, (16, 16)), (16, 16)), ramp[..., 0])
    np.testing.assert_allclose(gray.values(ramp), ramp[..., 0] / 255, atol=1e-7)
    np.testing.assert_array_equal(gray.values(ramp[..., 0]), gray.values(ramp))
    picture = np.random.default_rng(0).integers(0, 256, (9, 5, 3), dtype=np.uint8)
    codec = infer_codec([picture])
    assert codec == Codec("rgb")
    assert codec.paint(picture) is picture
    np.testing.assert_array_equal(codec.decode(to_model(picture, (9, 5)), (9, 5)), picture)
    np.testing.assert_allclose(codec.values(picture), picture / 255, atol=1e-7)


def test_gray_of_a_colour_is_that_of_pillow() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 5, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(picture).convert("L")).astype(int)
    assert np.abs(Codec("gray").paint(picture)[..., 0] - expected).max() <= 1


def test_mask_outlines_are_smooth_when_enlarged() -> None:
    disc = np.hypot(*(np.mgrid[:32, :32] - 15.5)) < 10
    codec = Codec("mask")
    small = to_model(rgb(np.hypot(*np.mgrid[-64:64, -64:64] + 0.5) < 40) * np.uint8(255), (32, 32))
    answer = codec.values(codec.decode(small, (128, 128)))
    exact = np.hypot(*np.mgrid[-64:64, -64:64] + 0.5) < 40
    blocks = np.kron(disc, np.ones((4, 4), bool))
    assert np.mean(answer != exact) < np.mean(blocks != exact) / 2


@pytest.mark.parametrize("codec", [Codec("rgb"), Codec("mask"), Codec("labels", VOC)])
def test_one_pixel_and_answers_beyond_the_range(codec: Codec) -> None:
    answer = np.full((3, 8, 8), 1.7, np.float32)
    assert codec.decode(answer, (1, 1)).shape[:2] == (1, 1)
    assert codec.decode(answer, (3, 17)).shape[:2] == (3, 17)


@pytest.mark.parametrize("name", CODECS)
def test_answers_that_are_not_finite_are_refused(name: str) -> None:
    codec = Codec(name, VOC if name == "labels" else ())
    with pytest.raises(ModelError, match="not finite"):
        codec.decode(np.full((3, 8, 8), np.inf, np.float32), (8, 8))


def test_a_named_codec_gets_its_colours_from_the_targets() -> None:
    soft = rgb(np.clip((30 - np.hypot(*np.mgrid[-32:32, -32:32])) * 20, 0, 200))
    assert infer_codec([soft], name="mask") == Codec("mask", ((0, 0, 0), (200, 200, 200)))
    assert infer_codec([soft], name="gray") == Codec("gray")
    two = rgb(DISC * 255)
    assert infer_codec([two], name="labels") == Codec("labels", ((0, 0, 0), (255, 255, 255)))


def test_targets_that_do_not_fit_a_named_codec() -> None:
    with pytest.raises(DataError, match="256 colours, and labels take 2 to 64"):
        infer_codec([rgb(np.arange(256).reshape(16, 16))], name="labels")
    with pytest.raises(DataError, match="two levels"):
        infer_codec([rgb(np.zeros((4, 4)))], name="mask")
    with pytest.raises(DataError, match="no target"):
        infer_codec([])
    with pytest.raises(ConfigError, match="Did you mean 'labels'"):
        infer_codec([], name="label")


def test_one_flat_colour_is_no_mask() -> None:
    assert infer_codec([rgb(np.zeros((4, 4)))]).name == "gray"


@pytest.mark.parametrize("codec", [Codec("rgb"), Codec("mask"), Codec("labels", VOC)])
def test_codecs_go_through_dictionaries(codec: Codec) -> None:
    assert Codec.from_dict(codec.to_dict()) == codec


def test_a_given_order_of_mask_colours_is_kept() -> None:
    codec = Codec.from_dict({"name": "mask", "colours": [255, [0, 0, 0]]})
    np.testing.assert_array_equal(codec.values(rgb(DISC * 255)), ~DISC)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "masks"}, "Did you mean 'mask'"),
        ({"name": "mask", "colors": []}, "Did you mean 'colours'"),
        ({}, "codec has no name"),
        ({"name": "mask", "colours": [0]}, "2 different colours"),
        ({"name": "mask", "colours": [0, 0]}, "2 different colours"),
        ({"name": "rgb", "colours": [0, 1]}, "0 different colours"),
        ({"name": "labels"}, "2 to 64 different colours"),
        ({"name": "mask", "colours": [0, 256]}, "0 to 255"),
        ({"name": "mask", "colours": [0, [1, 2]]}, "0 to 255"),
        ({"name": "mask", "colours": [0, "white"]}, "0 to 255"),
    ],
)
def test_wrong_codecs_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Codec.from_dict(values)

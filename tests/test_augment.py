"""References: the eight symmetries of a square written out, and crops found in the image."""

from itertools import permutations

import numpy as np
import pytest

from fewshot_rt.augment import KINDS, LEAST_CROP, OF_PLACES, Augmentation, are_rearranged
from fewshot_rt.errors import ConfigError

SQUARE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
WIDE = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)


def variants(augmentation: Augmentation, image: np.ndarray, count: int = 64) -> list[np.ndarray]:
    made = [augmentation.variant(image, image, index=i, seed=1) for i in range(1, count)]
    for source, target in made:
        np.testing.assert_array_equal(source, target)
        assert source.flags.c_contiguous
    return [source for source, _ in made]


def distinct(images: list[np.ndarray]) -> set[bytes]:
    return {repr(image.shape).encode() + image.tobytes() for image in images}


@pytest.mark.parametrize("kinds", [(), *((kind,) for kind in KINDS), KINDS])
@pytest.mark.parametrize("image", [SQUARE, WIDE, SQUARE[:1, :1], WIDE[:1]])
def test_input_and_target_change_alike(kinds: tuple[str, ...], image: np.ndarray) -> None:
    variants(Augmentation(kinds), image)


def test_index_zero_and_no_kinds_are_the_pair_itself() -> None:
    for augmentation, index in ((Augmentation(KINDS), 0), (Augmentation(()), 5)):
        source, target = augmentation.variant(SQUARE, 255 - SQUARE, index=index, seed=0)
        np.testing.assert_array_equal(source, SQUARE)
        np.testing.assert_array_equal(target, 255 - SQUARE)


def test_the_same_seed_and_index_make_the_same_variant() -> None:
    augmentation = Augmentation(KINDS)
    one, two = variants(augmentation, WIDE), variants(augmentation, WIDE)
    assert [image.tobytes() for image in one] == [image.tobytes() for image in two]
    other = [augmentation.variant(WIDE, WIDE, index=i, seed=2)[0] for i in range(1, 64)]
    assert [image.tobytes() for image in one] != [image.tobytes() for image in other]


def test_flips_are_the_four() -> None:
    expected = [WIDE, WIDE[::-1], WIDE[:, ::-1], WIDE[::-1, ::-1]]
    assert distinct(variants(Augmentation(("flips",)), WIDE)) == distinct(expected)


def test_turns_are_the_four_and_mirror_nothing() -> None:
    expected = [np.rot90(SQUARE, quarters) for quarters in range(4)]
    assert distinct(variants(Augmentation(("turns",)), SQUARE)) == distinct(expected)
    assert distinct(variants(Augmentation(("turns",)), WIDE)) == distinct([WIDE])


def test_flips_and_turns_are_the_eight() -> None:
    turned = [np.rot90(image, k) for image in (SQUARE, SQUARE[::-1]) for k in range(4)]
    made = variants(Augmentation(("flips", "turns")), SQUARE, count=200)
    assert distinct(made) == distinct(turned)


def test_crops_are_windows_of_the_image() -> None:
    rows, columns = np.mgrid[:60, :100].astype(np.uint8)
    image = np.stack([rows, columns, rows * 0], axis=-1)
    crops = variants(Augmentation(("crops",)), image)
    for crop in crops:
        height, width = crop.shape[:2]
        top, left = crop[0, 0, :2]
        np.testing.assert_array_equal(crop, image[top : top + height, left : left + width])
        assert LEAST_CROP * 60 - 1 <= height <= 60
        assert abs(height / 60 - width / 100) < 0.02
    assert min(crop.shape[0] for crop in crops) < 42
    assert max(crop.shape[0] for crop in crops) > 55
    assert {int(crop[0, 0, 0]) for crop in crops} > {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("text", "codec", "kinds"),
    [
        ("auto", "mask", OF_PLACES),
        ("auto", "labels", OF_PLACES),
        ("auto", "rgb", ()),
        ("auto", "gray", ()),
        ("none", "mask", ()),
        ("flips", "rgb", ("flips",)),
        ("flips, crops", "rgb", ("flips", "crops")),
    ],
)
def test_texts(text: str, codec: str, kinds: tuple[str, ...]) -> None:
    pairs = [(SQUARE, SQUARE[::-1]), (SQUARE, SQUARE // 2)]  # the last is not rearranged
    assert Augmentation.parse(text, codec=codec, pairs=pairs).kinds == kinds


def test_auto_changes_colours_where_targets_are_inputs_in_another_order() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    puzzle = np.concatenate([noise[8:], noise[:8]])
    written_again = np.clip(puzzle.astype(int) + rng.integers(-2, 3, puzzle.shape), 0, 255)
    for codec in ("rgb", "mask"):
        pairs = [(noise, noise[:, ::-1]), (noise, written_again.astype(np.uint8))]
        assert Augmentation.parse("auto", codec=codec, pairs=pairs).kinds == ("colours",)
    # Channels that are never alike, so that swapping them is not a matter of places.
    source = (noise // [1, 2, 4] + [0, 20, 180]).astype(np.uint8)
    assert are_rearranged([(source, source[::-1])])
    assert are_rearranged([(source, source[::-1]), (source, source)])
    for target in (source, 255 - source, source // 2, source[:, ::-1] // 2, source[..., ::-1]):
        assert (
            not are_rearranged([(source, source[::-1]), (source, target)] * 2) or target is source
        )
        assert not are_rearranged([(source, target)])
    assert not are_rearranged([(source, source[:8])])
    assert not are_rearranged([])


def test_colours_are_the_six_orders_with_any_channel_inverted() -> None:
    made = variants(Augmentation(("colours",)), SQUARE, count=600)
    expected = []
    for order in permutations(range(3)):
        for signs in range(8):
            inverted = [255 - SQUARE[..., c] if signs >> c & 1 else SQUARE[..., c] for c in order]
            expected.append(np.stack(inverted, axis=-1))
    assert distinct(made) == distinct(expected)


def test_an_unknown_kind_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown augmentation 'flip'\. Did you mean 'flips'"):
        Augmentation.parse("crops,flip", codec="mask", pairs=[])

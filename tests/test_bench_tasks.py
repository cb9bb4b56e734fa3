"""References: pixels moved by hand, Pillow's resize, dots at centres known in advance."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fewshot_rt.augment import are_rearranged
from fewshot_rt.benchmarks import photographs, scenes
from fewshot_rt.benchmarks.tasks import (
    GROUPS,
    SHUFFLE,
    TASKS,
    flip,
    jigsaw,
    mirror,
    nuclei,
    turn,
    write_task,
    zoom,
)
from fewshot_rt.codecs import Codec
from fewshot_rt.errors import ConfigError, DataError
from fewshot_rt.images import read_image, to_uint8, write_image
from fewshot_rt.metrics import METRICS
from fewshot_rt.task import Task, lint, load_pair
from fewshot_rt.world import VOCABULARY
from fewshot_rt.world.render import LABEL_COLOURS

SIZE = 32
RNG = np.random.default_rng(0)
CRAB = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", TASKS)
def test_draws_are_nested_repeatable_and_their_splits_apart(name: str) -> None:
    draw = TASKS[name].draw
    few, more = draw("train", 1, SIZE, 5), draw("train", 2, SIZE, 5)
    test = draw("test", 2, SIZE, 5)
    for one, two in zip(few, more, strict=True):
        assert two.shape == (2, SIZE, SIZE, 3)
        assert two.dtype == np.uint8
        np.testing.assert_array_equal(one, two[:1])
    inputs = np.concatenate([more[0], test[0]]).astype(int)
    for i in range(4):
        for j in range(i):
            assert np.abs(inputs[i] - inputs[j]).mean() > 1
    assert np.abs(more[0].astype(int) - more[1]).mean() > 0.5


def test_another_seed_gives_other_pairs_and_a_wrong_call_says_so() -> None:
    draw = TASKS["scene-drain"].draw
    assert (draw("train", 1, SIZE, 5)[0] != draw("train", 1, SIZE, 6)[0]).any()
    with pytest.raises(ConfigError, match="Possible: test, train"):
        draw("dev", 1, SIZE, 0)
    with pytest.raises(DataError, match="at least 1"):
        draw("train", 0, SIZE, 0)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_of_a_group_that_says_what_pretraining_saw(name: str) -> None:
    case = TASKS[name]
    assert case.group in GROUPS
    assert (case.name.removeprefix("scene-") in VOCABULARY) or case.group != "world"
    assert (case.name.removeprefix("scene-") not in VOCABULARY) or case.group != "kept-out"
    assert case.name.startswith("scene-") or case.group != "world"
    assert not case.name.startswith("scene-") or case.group != "photographs"
    is_rearranged = are_rearranged(zip(*case.draw("train", 4, SIZE, 0), strict=True))
    assert case.moves == (is_rearranged or case.name == "zoom")
    assert case.codec in METRICS[case.metric].codecs


@pytest.mark.parametrize("name", TASKS)
def test_targets_are_what_the_codec_says(name: str) -> None:
    case = TASKS[name]
    inputs, targets = case.draw("train", 1, SIZE, 3)
    if case.codec == "mask":
        assert set(np.unique(targets)) == {0, 255}
    if case.codec in ("mask", "gray"):
        assert (targets == targets[..., :1]).all()
    changes = {"mirror": mirror, "flip": flip, "jigsaw": jigsaw, "quarter-turn": turn}
    if case.name in changes or (case.group == "kept-out" and case.codec == "rgb"):
        change = changes[case.name.removeprefix("scene-")]
        np.testing.assert_array_equal(targets[0], change(inputs[0]))


def test_flips_and_turns_are_moved_pixels() -> None:
    for y in range(8):
        for x in range(8):
            assert (mirror(CRAB)[y, x] == CRAB[y, 7 - x]).all()
            assert (flip(CRAB)[y, x] == CRAB[7 - y, x]).all()
            assert (turn(CRAB)[y, x] == CRAB[x, 7 - y]).all()


def test_the_world_mirrors_pictures_as_we_do_but_for_noise_fixed_to_pixels() -> None:
    inputs, targets = TASKS["scene-mirror"].draw("train", 6, SIZE, 0)
    errors = [
        np.abs(mirror(i).astype(int) - t).mean() for i, t in zip(inputs, targets, strict=True)
    ]
    assert np.median(errors) < 2


def test_jigsaw_moves_each_quarter_and_comes_round_after_four() -> None:
    def quarter(image: np.ndarray, k: int) -> np.ndarray:
        return image[4 * (k // 2) :, 4 * (k % 2) :][:4, :4]

    assert all(k != number for k, number in enumerate(SHUFFLE))
    for k, number in enumerate(SHUFFLE):
        np.testing.assert_array_equal(quarter(jigsaw(CRAB), k), quarter(CRAB, number))
    image, seen = CRAB, []
    for _ in range(4):
        image = jigsaw(image)
        seen.append(bool((image == CRAB).all()))
    assert seen == [False, False, False, True]
    with pytest.raises(DataError, match="even size"):
        jigsaw(CRAB[:7])


def test_zoom_is_pillows_resize_of_the_middle() -> None:
    dim = 80 + CRAB // 4  # Pillow clips bytes between rows and columns
    middle = Image.fromarray(dim).crop((2, 2, 6, 6)).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.abs(zoom(dim).astype(int) - np.asarray(middle)).max() <= 1


def test_a_dot_stands_at_the_centre_of_every_region() -> None:
    silhouette = np.zeros((64, 64, 3), np.uint8)
    centres = [(10, 10), (30, 50), (52, 20)]
    for (y, x), r in zip(centres, (2, 4, 6), strict=True):
        silhouette[y - r : y + r + 1, x - r : x + r + 1] = 255
    silhouette[0, 63] = 255  # a speck
    dots = scenes.draw_dots(silhouette)[..., 0] > 0
    regions, count = ndimage.label(dots)
    found = ndimage.center_of_mass(dots, regions, range(1, count + 1))
    np.testing.assert_allclose(sorted(found), centres, atol=1e-9)
    rows, columns = np.indices((64, 64))
    disc = (rows - 10) ** 2 + (columns - 10) ** 2 <= 4**2
    np.testing.assert_array_equal(regions == regions[10, 10], disc)


def test_a_picture_with_too_many_regions_gets_no_dot() -> None:
    silhouette = np.zeros((64, 64, 3), np.uint8)
    for k in range(9):
        silhouette[20 * (k // 3) :, 20 * (k % 3) :][:8, :8] = 255
    assert not scenes.draw_dots(silhouette).any()
    silhouette[:8, :8] = 0
    assert ndimage.label(scenes.draw_dots(silhouette)[..., 0])[1] == 8


def test_labels_are_the_worlds_colours_inside_of_its_silhouettes() -> None:
    palette = {tuple(c) for c in to_uint8(np.array(LABEL_COLOURS)).tolist()}
    assert set(scenes.LABELS) == palette | {(0, 0, 0)}
    inputs, labels = TASKS["scene-labels"].draw("train", 4, SIZE, 0)
    others, silhouettes = TASKS["scene-silhouette"].draw("train", 4, SIZE, 0)
    same = [i for i in range(4) if (inputs[i] == others[i]).all()]
    assert same
    for i in same:
        np.testing.assert_array_equal(labels[i].any(axis=-1), silhouettes[i][..., 0] == 255)
    assert {tuple(c) for c in labels.reshape(-1, 3).tolist()} <= set(scenes.LABELS)


def test_a_codec_shows_labels_in_colours_near_the_worlds() -> None:
    colours = np.array(scenes.LABELS, np.uint8)[None]
    shown = Codec("labels", scenes.LABELS).paint(colours)[0].astype(int)
    apart = np.abs(shown - colours[0]).max(axis=-1)
    assert sum(apart <= 80) == len(apart) - 1  # white stands for orange


def test_photographs_are_used_in_one_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(photographs.NAMES["train"]) & set(photographs.NAMES["test"])
    two = np.repeat(RNG.integers(0, 100, (90, 160, 1), dtype=np.uint8), 3, axis=-1)
    two[:, 80:] += 150
    monkeypatch.setattr(photographs, "read_photograph", lambda name: two)
    draw = TASKS["colouring"].draw
    assert draw("train", 6, SIZE, 0)[1].max() < 130
    assert draw("test", 6, SIZE, 0)[1].min() > 130


@pytest.mark.parametrize("name", photographs.PAGES)
def test_ink_is_darker_than_the_paper_around_it(name: str) -> None:
    photograph, ink = photographs.page(name)
    near = ndimage.uniform_filter(photograph.astype(float), photographs.PAGE_WINDOW)
    assert 0.02 < (ink > 0).mean() < 0.25
    assert (near - photograph)[ink > 0].mean() > 10
    assert (photograph[ink > 0] < near[ink > 0]).all()


def test_edges_follow_a_step() -> None:
    crop = np.zeros((16, 16, 3), np.uint8)
    crop[:, 8:] = 200
    _, target = photographs.edges(crop, RNG)
    assert set(target[8, :, 0].argsort()[-2:]) == {7, 8}
    assert not target[:, [0, 1, 2, 13, 14, 15]].any()


def test_noise_and_holes_are_as_large_as_said() -> None:
    gray = np.full((64, 64, 3), 100, np.uint8)
    noisy, clean = photographs.denoising(gray, np.random.default_rng(0))
    assert clean is gray
    assert noisy.std() == pytest.approx(0.15 * 255, rel=0.05)
    covered, whole = photographs.inpainting(gray, np.random.default_rng(0))
    rows, columns = np.nonzero((covered != whole).any(axis=-1))
    side = rows.max() - rows.min() + 1
    assert side == columns.max() - columns.min() + 1
    assert 0.2 * 64 - 1 <= side <= 0.4 * 64 + 1
    assert len(rows) == side**2


@pytest.mark.parametrize("name", ["coin-masks", "scene-labels", "edges", "mirror"])
def test_a_written_task_loads_with_the_drawn_pixels(name: str, tmp_path: Path) -> None:
    case = TASKS[name]
    write_task(case, tmp_path, train=3, test=2, size=SIZE, seed=0)
    write_task(case, tmp_path, train=2, test=1, size=SIZE, seed=1)
    assert lint(tmp_path) == []
    task = Task.load(tmp_path)
    assert (task.name, task.codec.name, task.metrics[0]) == (name, case.codec, case.metric)
    assert task.codec.colours == case.colours or case.codec == "mask"
    for split, count in (("train", 2), ("test", 1)):
        inputs, targets = case.draw(split, count, SIZE, 1)
        pairs = task.split(split).pairs
        assert len(pairs) == count
        for pair, source, target in zip(pairs, inputs, targets, strict=True):
            np.testing.assert_array_equal(load_pair(pair, task.codec)[0], source)
            np.testing.assert_array_equal(read_image(pair.target), target)


def test_a_folder_of_nuclei(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 3)):
        for k in range(count):
            image = np.full((40, 40, 3), 10 * k + 100 * (split == "test"), np.uint8)
            write_image(tmp_path / split / "input" / f"{k}.png", image)
            mask = np.zeros((40, 40), np.uint8)
            mask[:20, : 5 * k + 5] = 255
            write_image(tmp_path / split / "target" / f"{k}.png", mask)
    draw = nuclei(tmp_path).draw
    inputs, masks = draw("train", 4, 20, 0)
    assert sorted(inputs[:, 0, 0, 0]) == [0, 10, 20, 30]
    for image, mask in zip(inputs, masks, strict=True):
        k = image[0, 0, 0] // 10
        assert set(np.unique(mask)) == {0, 255}
        assert abs(int((mask[..., 0] > 0).sum()) - 10 * (5 * k + 5) / 2) <= 10
    np.testing.assert_array_equal(draw("train", 2, 20, 0)[0], inputs[:2])
    assert draw("test", 3, 20, 0)[0].min() >= 100
    with pytest.raises(DataError, match="at most 3"):
        draw("test", 4, 20, 0)


def test_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    photographs.read_photograph.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(DataError, match=r"Install fewshot-rt\[demo\]"):
        TASKS["mirror"].draw("train", 1, SIZE, 0)

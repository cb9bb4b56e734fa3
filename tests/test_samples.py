"""Several answers to one image: closed forms of the noise, counts of passes, and files.

The reference draws the noises one by one from NumPy's generator, and answers one row at a time.
"""

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewshot_rt.codecs import Codec
from fewshot_rt.errors import ConfigError, DataError, ModelError
from fewshot_rt.images import read_image, to_model, write_image
from fewshot_rt.predict import plan, predict
from fewshot_rt.predictor import Predictor, Recipe, Runner, draw_noises
from fewshot_rt.runs import open_run
from fewshot_rt.sample import sample
from fewshot_rt.samples import decode_samples
from fewshot_rt.schedule import Schedule
from fewshot_rt.tiles import Tiling

Arrays = Mapping[str, np.ndarray]
SIZE = (12, 16)
SHAPE = (3, 2, *SIZE)
SEED, SPREAD = 7, 0.2
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
CODECS = [Codec("rgb"), Codec("gray"), Codec("mask"), Codec("labels", (BLACK, RED, GREEN, BLUE))]
FLAGS = ["--base", "base", "--batch", "2", "--variants", "2", "--rank", "4", "--steps", "2"]
IMAGES = Path("pairs/test/input")


def denoise(tensors: Arrays) -> dict[str, np.ndarray]:
    """In one step, the answer is half the image and a little of the noise."""
    time = tensors["time"][:, None, None, None, None]
    clean = tensors["word"][0, 0] * tensors["half"] + SPREAD * tensors["noisy"]
    return {"prediction": ((tensors["noisy"] - clean) / time).astype(np.float32)}


def dice(
    codec: Codec | None = None, *, batch: int = 4, calls: Counter | None = None, **recipe: Any
) -> Predictor:
    """Roles that answer with an image and a noise, and count their calls by rows."""
    roles: dict[str, Runner] = {
        "encoder": lambda tensors: {"half": tensors["image"][:, :, None] / 2},
        "denoiser": denoise,
        "decoder": lambda tensors: {"image": tensors["latents"][:, :, -1]},
    }

    def counted(role: str, tensors: Arrays) -> dict[str, np.ndarray]:
        first = tensors["noisy" if role == "denoiser" else next(iter(tensors))]
        if calls is not None:
            calls[role, len(first)] += 1
        return roles[role](tensors)

    values = {
        "noise": "seeded",
        "trained_noise": "seeded",
        "seed": SEED,
        "size": SIZE,
        "latent_shape": SHAPE,
    } | recipe
    values |= {"codec": codec or Codec("rgb"), "metrics": ("mae",), "schedule": Schedule()}
    return Predictor(
        {role: partial(counted, role) for role in roles},
        prompt={"word": np.ones((1, 1), np.float32)},
        recipe=Recipe(task="dice", batch=batch, **values),
        origin="test",
    )


def drawn(count: int) -> np.ndarray:
    """The noises, one by one. Shapes: [N, C, F, h, w]."""
    rng = np.random.default_rng(SEED)
    return np.stack([rng.standard_normal(SHAPE, np.float32) for _ in range(count)])


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(count).uniform(-1, 1, (count, 3, *SIZE)).astype(np.float32)


def closed_form(images: np.ndarray, count: int) -> np.ndarray:
    """Shapes: images [B, 3, H, W]; result [B, N, 3, H, W]."""
    return images[:, None] / 2 + SPREAD * drawn(count)[None, :, :, -1]


def sampled(predictor: Predictor, images: np.ndarray, count: int) -> np.ndarray:
    return predictor.answer_samples(images, draw_noises(predictor.recipe, count))


def statuses(results: Any) -> dict[str, str]:
    return {result.job.source.name: result.status for result in results}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of the model's size, one of them in a sub-folder."""
    source = tmp_path / "images"
    for number, name in enumerate(("a.png", "b.png", "deep/c.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        write_image(source / name, pixels)
    return source


@pytest.mark.parametrize(("batch", "images", "count"), [(4, 1, 4), (4, 3, 3), (3, 2, 5), (1, 1, 2)])
def test_samples_are_the_closed_form_of_their_noises(batch, images, count):
    given = pictures(images)
    answers = sampled(dice(batch=batch), given, count)
    np.testing.assert_allclose(answers, closed_form(given, count), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("batch", "images", "count"), [(4, 1, 4), (4, 4, 4), (4, 3, 3), (3, 2, 7)])
def test_noises_of_one_image_are_one_pass_of_a_batch(batch, images, count):
    calls: Counter = Counter()
    sampled(dice(batch=batch, steps=2, calls=calls), pictures(images), count)
    passes = -(-images * count // batch)
    expected = {"encoder": 1, "denoiser": 2 * passes, "decoder": passes}
    assert calls == {(role, batch): number for role, number in expected.items()}


@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_samples_are_those_of_single_walks(solver):
    """Four steps and a network that mixes: the rows of a batch are those of N x B walks alone."""
    images = pictures(3)
    answers = sampled(dice(steps=4, solver=solver), images, 5)

    def predicted(noisy: np.ndarray, time: np.ndarray, *, half: np.ndarray) -> np.ndarray:
        word = np.ones((1, 1), np.float32)
        return denoise({"noisy": noisy, "time": time, "half": half, "word": word})["prediction"]

    for image, found in zip(images, answers, strict=True):
        walk = partial(predicted, half=image[None, :, None] / 2)
        for noise, answer in zip(drawn(5), found, strict=True):
            *_, last = sample(walk, noise[None], schedule=Schedule(), steps=4, solver=solver)
            np.testing.assert_array_equal(answer, last.latents[0, :, -1])


def test_first_sample_is_the_single_answer_and_few_begin_many():
    predictor, images = dice(steps=3), pictures(2)
    few, many = sampled(predictor, images, 3), sampled(predictor, images, 6)
    np.testing.assert_array_equal(few[:, 0], predictor.answer(images))
    np.testing.assert_array_equal(many[:, :3], few)


@pytest.mark.parametrize(
    ("noise", "options", "hint"),
    [
        ("seeded", {"samples": 1}, "at least 2"),
        ("seeded", {"samples": 0}, "at least 2"),
        ("seeded", {"samples": 4, "tiling": Tiling()}, "windows are not sampled"),
        ("zero", {"samples": 4}, "--objective diffusion or grid"),
    ],
)
def test_impossible_samples_are_refused_before_anything_is_done(
    noise, options, hint, folder, tmp_path
):
    jobs = plan(folder, tmp_path / "out", is_sampled=True)
    with pytest.raises(ConfigError, match=hint):
        next(predict(dice(trained_noise=noise), jobs, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [2, 3, 8, 31])
def test_pictures_have_mean_and_standard_deviation(count):
    """Against NumPy's in float64, with values that leave [-1, 1]."""
    spread = np.linspace(0, 0.8, 7)  # over the width: from agreement to more than the map shows
    samples = np.random.default_rng(count).normal(0.2, spread, (count, 3, 9, 7)).astype(np.float32)
    pixels = (np.clip(samples.astype(np.float64), -1, 1) + 1) / 2
    answer, apart = decode_samples(Codec("rgb"), samples, (9, 7))
    exact = 255 * pixels.mean(axis=0).transpose(1, 2, 0)
    assert np.abs(answer - exact).max() <= 0.5 + 1e-3
    bright = np.minimum(255, 255 * pixels.std(axis=0).mean(axis=0) / 0.125)
    assert np.abs(apart - bright).max() <= 0.5 + 1e-3
    gray, apart = decode_samples(Codec("gray"), samples, (9, 7))
    assert np.abs(gray - exact.mean(axis=-1)).max() <= 0.5 + 1e-3
    bright = np.minimum(255, 255 * pixels.mean(axis=1).std(axis=0) / 0.125)
    assert np.abs(apart - bright).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_samples_that_agree_give_their_answer_and_a_black_map(codec):
    one = pictures(1)
    for size in (SIZE, (31, 17), (1, 1)):
        answer, apart = decode_samples(codec, np.repeat(one, 4, axis=0), size)
        np.testing.assert_array_equal(answer, codec.decode(one[0], size))
        assert apart.shape == size
        assert apart.dtype == np.uint8
        assert not apart.any()


@pytest.mark.parametrize("name", ["rgb", "gray"])
def test_the_widest_spread_is_white(name):
    samples = np.repeat(np.array([-1, 1, 3, -3], np.float32), 3 * 4).reshape(4, 3, 2, 2)
    answer, apart = decode_samples(Codec(name), samples, (5, 6))
    assert (np.abs(answer.astype(int) - 127.5) <= 1).all()
    assert (apart == 255).all()


@pytest.mark.parametrize("colours", [(), ((9, 9, 9), (200, 0, 0))], ids=["gray", "colours"])
def test_masks_are_thresholded_after_the_mean(colours):
    """By hand: values of three samples, whether their mean is foreground, how many say otherwise.

    In the second column two of three are background, yet the mean is above zero.
    """
    values = np.array([[0.5, -0.1, 1, -1], [0.5, -0.1, -1, -1], [0.5, 0.9, -1, -1]], np.float32)
    samples = np.broadcast_to(values[:, None, None], (3, 3, 2, 4))
    codec = Codec("mask", colours)
    answer, apart = decode_samples(codec, samples, (2, 4))
    expected = np.array(codec.colours)[[1, 1, 0, 0]]
    expected = expected if colours else expected[:, 0]
    np.testing.assert_array_equal(answer, np.broadcast_to(expected, (2, *expected.shape)))
    np.testing.assert_array_equal(apart, [[0, 170, 85, 0]] * 2)


def test_labels_take_the_class_of_most_and_no_other():
    """Red, green and blue blended are black, which is a class that no sample shows."""
    codec = CODECS[-1]
    rows = [[RED, RED, BLACK], [GREEN, RED, BLACK], [BLUE, BLUE, BLACK]]
    shown = codec.paint(np.array(rows, np.uint8))  # [N, W, 3]
    samples = (shown.transpose(0, 2, 1)[:, :, None] / np.float32(127.5) - 1).astype(np.float32)
    answer, apart = decode_samples(codec, samples, (1, 3))
    assert tuple(answer[0, 0]) in {RED, GREEN, BLUE}
    assert tuple(answer[0, 1]) == RED
    assert tuple(answer[0, 2]) == BLACK
    np.testing.assert_array_equal(apart, [[170, 85, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_one_sample_that_is_not_finite_spoils_the_answer(codec, bad):
    samples = np.zeros((3, 3, 4, 4), np.float32)
    samples[1, 0, 0, 0] = bad
    with pytest.raises(ModelError, match="not finite"):
        decode_samples(codec, samples, (4, 4))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_files_are_the_mean_and_the_map(codec, folder, tmp_path):
    out = tmp_path / "out"
    jobs = plan(folder, out, is_sampled=True)
    assert set(statuses(predict(dice(codec), jobs, samples=5)).values()) == {"done"}
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    names = {"a.png", "b.png", "deep/c.png"}
    assert written == names | {f"disagreement/{name}" for name in names}
    for name in names:
        planes = to_model(read_image(folder / name), SIZE)
        expected = decode_samples(codec, closed_form(planes[None], 5)[0], SIZE)
        for path, pixels in zip((out / name, out / "disagreement" / name), expected, strict=True):
            with Image.open(path) as file:
                assert np.abs(np.asarray(file).astype(int) - pixels).max() <= 1


def test_same_bytes_whatever_the_company(folder, tmp_path):
    predictor = dice(steps=3)
    for source, out in ((folder, "all"), (folder / "b.png", "alone"), (folder, "again")):
        list(predict(predictor, plan(source, tmp_path / out, is_sampled=True), samples=3))
    for name in ("b.png", "disagreement/b.png"):
        first, *others = ((tmp_path / out / name).read_bytes() for out in ("all", "alone", "again"))
        assert others == [first, first]


@pytest.mark.parametrize("missing", ["a.png", "disagreement/a.png"])
def test_images_are_kept_if_both_files_are_there(folder, tmp_path, missing):
    out, predictor = tmp_path / "out", dice()
    jobs = plan(folder, out, is_sampled=True)
    list(predict(predictor, jobs, samples=3))
    before = {path: path.read_bytes() for job in jobs for path in job.files}
    (out / missing).unlink()
    found = statuses(predict(predictor, jobs, samples=3))
    assert found == {"a.png": "done", "b.png": "kept", "c.png": "kept"}
    assert {path: path.read_bytes() for path in before} == before
    list(predict(predictor, jobs, samples=2, overwrite=True))
    assert all(path.read_bytes() != old for path, old in before.items())


def test_answers_without_samples_are_answered_again(folder, tmp_path):
    out, predictor = tmp_path / "out", dice()
    list(predict(predictor, plan(folder, out)))
    found = statuses(predict(predictor, plan(folder, out, is_sampled=True), samples=2))
    assert set(found.values()) == {"done"}
    assert set(statuses(predict(predictor, plan(folder, out))).values()) == {"kept"}


def test_interrupted_samples_go_on(folder, tmp_path):
    for number in range(6):
        write_image(folder / f"{number}.png", np.zeros((4, 4), np.uint8))
    predictor = dice(batch=1)
    jobs = plan(folder, tmp_path / "out", is_sampled=True)
    results = predict(predictor, jobs, samples=2)
    next(results)
    results.close()
    whole = sum(all(path.exists() for path in job.files) for job in jobs)
    assert 1 <= whole < 9
    found = statuses(predict(predictor, jobs, samples=2))
    assert sorted(found.values()) == ["done"] * (9 - whole) + ["kept"] * whole


def test_an_old_map_never_passes_for_that_of_a_new_answer(folder, tmp_path, monkeypatch):
    """A disk that fails between the two files leaves an answer without a map, which is redone."""
    (job,) = plan(folder / "a.png", tmp_path / "out", is_sampled=True)
    list(predict(dice(), [job], samples=2))

    def fail_at_maps(path: Path, pixels: np.ndarray) -> None:
        if path == job.disagreement:
            raise DataError("the disk is full")
        write_image(path, pixels)

    with monkeypatch.context() as patch:
        patch.setattr("fewshot_rt.predict.write_image", fail_at_maps)
        (result,) = predict(dice(), [job], samples=5, overwrite=True)
    assert (result.status, result.error) == ("failed", "the disk is full")
    assert [path.exists() for path in job.files] == [True, False]
    assert statuses(predict(dice(), [job], samples=5)) == {"a.png": "done"}


def test_one_bad_image_does_not_stop_the_others(folder, tmp_path):
    """The good ones get files of their own size."""
    write_image(folder / "wide.png", np.zeros((5, 40, 3), np.uint8))
    (folder / "bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    found = statuses(predict(dice(), plan(folder, out, is_sampled=True), samples=2))
    assert found.pop("bad.png") == "failed"
    assert set(found.values()) == {"done"}
    assert not list(out.rglob("bad*"))
    assert {read_image(path).shape for path in out.rglob("wide.png")} == {(5, 40, 3)}


@pytest.mark.parametrize("name", ["disagreement/a.bmp", "Disagreement/A.png"])
def test_a_map_is_never_another_images_answer(folder, tmp_path, name):
    (folder / name).parent.mkdir()
    Image.new("RGB", (4, 4)).save(folder / name)
    assert len(plan(folder, tmp_path / "out")) == 4
    with pytest.raises(DataError, match="Rename one"):
        plan(folder, tmp_path / "out", is_sampled=True)


def test_files_never_replace_images_of_a_folder_below(folder, tmp_path):
    """Answers go to the parent of the images' folder, under names that images have there."""
    folder = folder.rename(tmp_path / "disagreement")
    assert len(plan(folder, tmp_path)) == 3
    with pytest.raises(DataError, match="Give another --out"):
        plan(folder, tmp_path, is_sampled=True)
    write_image(folder / "disagreement" / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="Give another --out"):
        plan(folder, tmp_path)


def test_links_cannot_lead_maps_outside(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "disagreement").symlink_to(tmp_path)
    assert len(plan(folder, out)) == 3
    with pytest.raises(DataError, match="leads out of"):
        plan(folder, out, is_sampled=True)


def test_from_training_to_maps(run):
    """The whole way on a tiny base: a network whose answers do depend on the noise."""
    status, _, err = run("train", "pairs", *FLAGS, "--objective", "diffusion", "--name", "two")
    assert status == 0, err
    status, out, err = run("predict", IMAGES, "--samples", 3, "--json")
    assert status == 0, err
    assert "where the 3 samples disagree: the folder disagreement there" in err
    summary = json.loads(out)
    assert (summary["samples"], summary["done"], summary["failed"]) == (3, 2, 0)
    _, out, _ = run("predict", IMAGES, "--samples", 3, "--json")
    assert json.loads(out)["kept"] == 2
    run("predict", IMAGES / "4.png", "--samples", 3, "--out", "alone")
    for name in ("4.png", "disagreement/4.png"):
        assert Path("alone", name).read_bytes() == Path("answers", name).read_bytes()
    status, _, err = run("predict", IMAGES, "--samples", 3, "--steps", 1)
    assert (status, "samples would agree" in err) == (2, True)
    predictor = open_run(Path("runs/two")).with_recipe(steps=8, noise="seeded")
    samples = sampled(predictor, to_model(read_image(IMAGES / "4.png"), (32, 32))[None], 3)[0]
    assert samples.std(axis=0).max() > 0.01
    files = decode_samples(Codec("mask"), samples, (32, 32))
    for name, pixels in zip(("4.png", "disagreement/4.png"), files, strict=True):
        with Image.open(Path("answers") / name) as file:
            np.testing.assert_array_equal(np.asarray(file), pixels)
    assert set(np.unique(files[1])) <= {0, 85, 170, 255}


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--samples", 1], "x>=2"),
        (["--samples", 3, "--tile"], "not both"),
        (["--samples", 3], "Train with --objective diffusion or grid"),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_possible(trained, words, hint):
    status, _, err = trained("predict", IMAGES, *words)
    assert status == 2
    assert hint in err
    assert not Path("answers").exists()

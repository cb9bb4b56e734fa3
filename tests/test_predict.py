"""Folders of images in, folders of answers out, with a predictor that inverts what it sees."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewshot_rt.codecs import Codec
from fewshot_rt.errors import ConfigError, DataError
from fewshot_rt.images import read_image
from fewshot_rt.predict import answer_images, plan, predict
from fewshot_rt.predictor import Predictor, Recipe
from fewshot_rt.schedule import Schedule

SIZE = (16, 16)


class Inverter:
    """Roles that answer an image with its negative, and count the batches."""

    def __init__(self, codec: Codec | None = None, *, batch: int = 4, **recipe: Any) -> None:
        self.batches = 0
        self.predictor = Predictor(
            {"encoder": self.encode, "denoiser": self.denoise, "decoder": self.decode},
            prompt={},
            recipe=Recipe(
                task="negative",
                codec=codec or Codec("rgb"),
                metrics=("mae",),
                size=SIZE,
                latent_shape=(3, 2, *SIZE),
                schedule=Schedule(),
                batch=batch,
                **recipe,
            ),
            origin="test",
        )

    def encode(self, tensors: Any) -> dict[str, np.ndarray]:
        self.batches += 1
        return {"first": tensors["image"][:, :, None]}

    def denoise(self, tensors: Any) -> dict[str, np.ndarray]:
        """Flow matching from x_t at time t towards the negative: (x_t - clean) / t."""
        clean = -np.repeat(tensors["first"], 2, axis=2)
        time = tensors["time"][:, None, None, None, None]
        return {"prediction": ((tensors["noisy"] - clean) / time).astype(np.float32)}

    def decode(self, tensors: Any) -> dict[str, np.ndarray]:
        return {"image": tensors["latents"][:, :, -1]}


def smooth(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """A picture that survives resizing: slow shades."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    a, b = rng.uniform(0, 1, (2, 3))
    return (255 * (a * y[..., None] + b * x[..., None]) / 2).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "images"
    (source / "deep" / "er").mkdir(parents=True)
    Image.fromarray(smooth(20, 30)).save(source / "a.png")
    Image.fromarray(smooth(33, 21, seed=1)).save(source / "deep" / "B.JPG")
    Image.fromarray(smooth(16, 16, seed=2)).save(source / "deep" / "er" / "c.bmp")
    Image.fromarray(smooth(64, 64, seed=3)).save(source / "d.webp", lossless=True)
    return source


def statuses(results: Any) -> dict[str, str]:
    return {result.job.source.name: result.status for result in results}


def test_one_answer_for_every_image(folder, tmp_path):
    out = tmp_path / "out"
    results = list(predict(Inverter().predictor, plan(folder, out)))
    assert set(statuses(results).values()) == {"done"}
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {"a.png", "deep/B.png", "deep/er/c.png", "d.png"}
    for name, original in {"a.png": "a.png", "deep/B.png": "deep/B.JPG", "d.png": "d.webp"}.items():
        image, answer = read_image(folder / original), read_image(out / name)
        assert answer.shape == image.shape
        assert np.abs(answer.astype(int) - (255 - image.astype(int))).mean() < 8


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("noise", ["zero", "seeded"])
def test_any_number_of_steps_reaches_the_ideal_answer(steps, noise):
    """With the ideal velocity the flow is straight: every number of steps ends at the answer."""
    predictor = Inverter(steps=steps, noise=noise).predictor
    images = np.random.default_rng(0).uniform(-1, 1, (3, 3, *SIZE)).astype(np.float32)
    np.testing.assert_allclose(predictor.answer(images), -images, atol=2e-6)


def test_modes_and_rotation(tmp_path):
    """Gray, 16 bit, palette, transparent and turned images all get answers of their own size."""
    source = tmp_path / "images"
    source.mkdir()
    picture = Image.fromarray(smooth(24, 40))
    picture.convert("L").save(source / "gray.png")
    picture.convert("P").save(source / "palette.png")
    picture.convert("RGBA").save(source / "rgba.png")
    picture.convert("1").save(source / "one.png")
    Image.fromarray((np.arange(24 * 40).reshape(24, 40) * 60).astype(np.uint16)).save(
        source / "deep.png"
    )
    turned = Image.Exif()
    turned[0x0112] = 6  # rotate by 90 degrees to show
    picture.save(source / "turned.jpg", exif=turned)
    out = tmp_path / "out"
    assert set(statuses(predict(Inverter().predictor, plan(source, out))).values()) == {"done"}
    sizes = {path.stem: read_image(path).shape[:2] for path in out.iterdir()}
    assert sizes.pop("turned") == (40, 24)
    assert set(sizes.values()) == {(24, 40)}


def test_unreadable_images_are_reported_and_the_rest_is_done(folder, tmp_path):
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    results = list(predict(Inverter().predictor, plan(folder, tmp_path / "out")))
    failed = {r.job.source.name: r.error for r in results if r.status == "failed"}
    assert set(failed) == {"cut.png", "empty.png", "text.jpg"}
    assert all(name in error for name, error in failed.items())
    assert sum(r.status == "done" for r in results) == 4
    assert not list((tmp_path / "out").rglob(".part-*"))


def test_answers_are_kept_unless_told_otherwise(folder, tmp_path):
    out = tmp_path / "out"
    inverter = Inverter()
    list(predict(inverter.predictor, plan(folder, out)))
    (out / "a.png").unlink()
    mark = (out / "d.png").stat().st_mtime_ns
    before = inverter.batches
    found = statuses(predict(inverter.predictor, plan(folder, out)))
    assert found == {"a.png": "done", "B.JPG": "kept", "c.bmp": "kept", "d.webp": "kept"}
    assert inverter.batches == before + 1
    assert (out / "d.png").stat().st_mtime_ns == mark
    found = statuses(predict(inverter.predictor, plan(folder, out), overwrite=True))
    assert set(found.values()) == {"done"}
    assert (out / "d.png").stat().st_mtime_ns > mark


def test_interrupted_prediction_goes_on(folder, tmp_path):
    out = tmp_path / "out"
    inverter = Inverter(batch=1)
    results = predict(inverter.predictor, plan(folder, out))
    next(results)
    results.close()
    there = set(out.rglob("*.png"))
    assert 1 <= len(there) < 4
    assert all(read_image(path).size for path in there)
    found = statuses(predict(inverter.predictor, plan(folder, out)))
    assert sorted(found.values()) == sorted(["kept"] * len(there) + ["done"] * (4 - len(there)))


def test_same_bytes_whatever_the_company(folder, tmp_path):
    """An answer does not depend on the other images, and a second run gives the same bytes."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "a.png", alone)
    predictor = Inverter(steps=3, noise="seeded").predictor
    for source, out in ((folder, "one"), (folder, "two"), (alone, "three")):
        list(predict(predictor, plan(source, tmp_path / out)))
    answers = [(tmp_path / out / "a.png").read_bytes() for out in ("one", "two", "three")]
    assert answers[0] == answers[1] == answers[2]


def test_images_that_differ_in_suffix_alone_both_get_answers(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for suffix in ("png", "bmp"):
        Image.fromarray(smooth(16, 16)).save(source / f"a.{suffix}")
    Image.fromarray(smooth(16, 16)).save(source / "b.png")
    answers = {job.answer.name for job in plan(source, tmp_path / "out")}
    assert answers == {"a.png.png", "a.bmp.png", "b.png"}


def test_answers_inside_the_folder_are_not_answered_again(folder):
    out = folder / "answers"
    list(predict(Inverter().predictor, plan(folder, out)))
    assert len(plan(folder, out)) == 4


def test_links_cannot_lead_answers_outside(folder, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "deep").symlink_to(elsewhere)
    with pytest.raises(DataError, match="leads out of"):
        plan(folder, out)


def test_answers_never_replace_images(folder):
    for source in (folder, folder / "a.png"):
        with pytest.raises(DataError, match="Give another --out"):
            plan(source, folder)


def test_answers_may_go_to_a_parent_folder(folder):
    assert len(plan(folder, folder.parent)) == 4


def test_two_answers_of_one_name_are_refused(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for name in ("a.png", "a.bmp", "a.png.bmp"):
        Image.fromarray(smooth(16, 16)).save(source / name)
    with pytest.raises(DataError, match="Rename one"):
        plan(source, tmp_path / "out")


def test_one_image_can_be_answered(folder, tmp_path):
    (job,) = plan(folder / "a.png", tmp_path / "out")
    assert job.answer == tmp_path / "out" / "a.png"


@pytest.mark.parametrize("given", ["missing", "empty"])
def test_nothing_to_answer_is_an_error(tmp_path, given):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=given):
        plan(tmp_path / given, tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs to mount")
def test_full_disk_loses_nothing(folder, tmp_path):
    """A real full disk: the answers that fit are whole, the others are reported."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=8k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting is not possible here")
    try:
        (disk / "filler").write_bytes(os.urandom(4096))
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / "large.png")
        results = list(predict(Inverter().predictor, plan(folder, disk / "out")))
        failed = [r for r in results if r.status == "failed"]
        assert failed
        assert all("disk is full" in r.error for r in failed)
        assert not [p for p in (disk / "out").rglob("*") if p.name.startswith(".part-")]
        for path in (disk / "out").rglob("*.png"):
            read_image(path)
    finally:
        os.system(f"umount {disk}")


def test_mask_answers_have_two_levels(folder, tmp_path):
    codec = Codec("mask", ((0, 0, 0), (7, 7, 7)))
    halves = np.zeros((20, 20, 3), np.uint8)
    halves[:, 10:] = 255
    Image.fromarray(halves).save(folder / "halves.png")
    list(predict(Inverter(codec).predictor, plan(folder, tmp_path / "out")))
    with Image.open(tmp_path / "out" / "halves.png") as answer:
        assert answer.mode == "L"
        pixels = np.asarray(answer)
    assert (pixels[:, :8] == 7).all()
    assert (pixels[:, 12:] == 0).all()
    assert set(np.unique(pixels)) == {0, 7}


def test_answer_of_one_image_is_that_of_the_folder(folder, tmp_path):
    predictor = Inverter().predictor
    list(predict(predictor, plan(folder, tmp_path / "out")))
    (alone,) = answer_images(predictor, [read_image(folder / "a.png")])
    assert np.array_equal(alone, read_image(tmp_path / "out" / "a.png"))


def test_recipe_survives_json():
    recipe = Inverter(Codec("labels", ((0, 0, 0), (9, 9, 9))), steps=3, noise="seeded").predictor
    assert Recipe.from_dict(recipe.recipe.to_dict()) == recipe.recipe


@pytest.mark.parametrize("change", [{"steps": 0}, {"noise": "loud"}, {"batch": 0}])
def test_impossible_recipes_are_refused(change):
    with pytest.raises(ConfigError):
        Inverter(**change)

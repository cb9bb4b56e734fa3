"""Self-distillation: the targets are the teacher's own way, and the student comes nearer to it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import cogvideox

from fewshot_rt.distill import _choose, _teacher_times, distill, make_lesson, walk
from fewshot_rt.distill_config import DistillConfig
from fewshot_rt.errors import ConfigError, DataError, ModelError
from fewshot_rt.fit import fit
from fewshot_rt.images import write_image
from fewshot_rt.runs import open_attached, open_run
from fewshot_rt.sample import sample
from fewshot_rt.schedule import Schedule
from fewshot_rt.train_config import TrainConfig


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, workshop: Path) -> Path:
    """A run of the diffusion objective, and images without targets."""
    place = tmp_path_factory.mktemp("distill")
    options: dict[str, Any] = {"steps": 30, "batch": 2, "rank": 4, "variants": 2, "rate": 0.02}
    config = TrainConfig(
        base=str(workshop / "base"), objective="diffusion", hold_out=0, device="cpu", **options
    )
    shutil.copytree(workshop / "pairs", place / "pairs")
    *_, _ = fit(place / "pairs", place / "runs" / "one", config)
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        write_image(place / "images" / f"{number}.png", pixels)
    return place


def open_cogvideox(tmp_path: Path, make_text_encoder: Any, write_noise_pairs: Any) -> Path:
    folder = cogvideox.write(tmp_path / "cog", "1.5", make_text_encoder())
    write_noise_pairs(tmp_path / "pairs", (32, 48))
    options: dict[str, Any] = {"size": "48x32", "steps": 1, "batch": 1, "rank": 2}
    config = TrainConfig(base=str(folder), objective="diffusion", hold_out=0, **options)
    *_, _ = fit(tmp_path / "pairs", tmp_path / "runs" / "one", config)
    return tmp_path / "runs" / "one"


@pytest.mark.parametrize("family", ["pocket", "cogvideox"])
def test_targets_lead_along_the_teachers_walk(
    family: str, shop: Path, tmp_path: Path, make_text_encoder: Any, write_noise_pairs: Any
) -> None:
    """In flow and in v: one step each by the targets ends where 8 steps of the sampler do."""
    run = shop / "runs" / "one"
    if family == "cogvideox":
        run = open_cogvideox(tmp_path, make_text_encoder, write_noise_pairs)
    base, _, values = open_attached(run, device="cpu")
    base.denoiser().requires_grad_(False)
    recipe, prompt = values["recipe"], values["prompt"]
    config = DistillConfig(steps=2, teacher_steps=8, draws=2)
    image = np.random.default_rng(0).uniform(-1, 1, (3, *recipe.size)).astype(np.float32)
    found = make_lesson(base, walk(base, [image], prompt, recipe, config), prompt).encoded
    assert len(found["noisy"]) == 4
    noise = torch.from_numpy(
        np.random.default_rng(recipe.seed).standard_normal(recipe.latent_shape, np.float32)
    )[None]
    torch.testing.assert_close(found["noisy"][:1], noise)
    conditions = base.condition(torch.from_numpy(image)[None], frames=recipe.latent_shape[1])
    denoiser = base.denoiser()
    *_, expected = sample(
        lambda x, t: denoiser(x, t, **conditions, **prompt),
        noise,
        schedule=recipe.schedule,
        steps=8,
    )
    ways = iter(found["target"][:2].split(1))
    *_, ours = sample(lambda x, t: next(ways), noise, schedule=recipe.schedule, steps=2)
    torch.testing.assert_close(ours.latents, expected.latents, rtol=1e-4, atol=1e-4)


def test_a_student_comes_nearer_to_its_teacher_and_is_a_run(shop: Path, tmp_path: Path) -> None:
    config = DistillConfig(steps=1, teacher_steps=8, updates=60, device="cpu")
    teacher, folder = shop / "runs" / "one", shop / "runs" / "short"
    *_, last = distill(teacher, shop / "images", folder, config)
    assert last.step == 60
    report = json.loads((folder / "distilled.json").read_text())
    assert report["error"] < report["error_before"] / 2
    student = open_run(folder)
    assert (student.recipe.steps, student.recipe.noise) == (1, "seeded")
    # On images that neither saw, too.
    images = np.random.default_rng(9).uniform(-1, 1, (4, 3, 32, 32)).astype(np.float32)
    long = open_run(teacher).with_recipe(steps=8, noise="seeded")
    plain = long.with_recipe(steps=1).answer(images)
    near, far = (np.abs(a - long.answer(images)).mean() for a in (student.answer(images), plain))
    assert near < far
    assert (shop / "runs" / "latest").resolve() == folder.resolve()


def test_what_cannot_be_distilled_is_said(shop: Path, workshop: Path, tmp_path: Path) -> None:
    config = DistillConfig(device="cpu")
    with pytest.raises(ModelError, match="in one step as it is"):
        next(distill(workshop / "runs" / "one", shop / "images", tmp_path / "x", config))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        next(distill(shop / "runs" / "one", tmp_path / "empty", tmp_path / "x", config))
    with pytest.raises(ConfigError, match="nothing to teach"):
        DistillConfig(steps=8, teacher_steps=8)
    with pytest.raises(ConfigError, match="updates"):
        DistillConfig(updates=0)
    with pytest.raises(ConfigError, match="rate"):
        DistillConfig(rate=0.0)


@pytest.mark.parametrize(("steps", "teacher_steps"), [(2, 8), (4, 32), (3, 8), (1, 5)])
@pytest.mark.parametrize(
    "schedule",
    [Schedule(shift=3.0), Schedule(kind="v"), Schedule(spacing="linear_quadratic")],
    ids=["shifted", "v", "linear_quadratic"],
)
def test_the_teacher_stops_where_the_student_does(
    schedule: Schedule, steps: int, teacher_steps: int
) -> None:
    config = DistillConfig(steps=steps, teacher_steps=teacher_steps)
    parts = list(_teacher_times(schedule, config))
    assert [part[0] for part in parts] == list(schedule.times(steps)[:-1])
    assert parts[-1][-1] == 0
    small = -(-teacher_steps // steps)
    assert {len(part) for part in parts} == {small + 1}
    walked = [time for part in parts for time in part[:-1]]
    assert walked == sorted(walked, reverse=True)
    if schedule.spacing == "trailing":
        assert walked == pytest.approx(schedule.times(small * steps)[:-1])


def test_no_more_images_are_walked_than_are_looked_at() -> None:
    paths = [Path(str(number)) for number in range(100)]
    config = DistillConfig(steps=4, draws=2, updates=20)
    assert len(_choose(paths, 2, config)) == 5
    assert sorted(_choose(paths, 100, config)) == sorted(paths)


def test_an_interrupted_distillation_goes_on_with_the_same_alone(
    shop: Path, tmp_path: Path
) -> None:
    teacher, images = shop / "runs" / "one", shop / "images"
    config = DistillConfig(steps=2, teacher_steps=4, draws=1, updates=6, device="cpu")
    whole = list(distill(teacher, images, tmp_path / "whole", config))
    assert {step.stage for step in whole} == {"walk", "train"}
    begun = distill(teacher, images, tmp_path / "parted", config)
    for step in begun:
        if step.step == 3:
            break
    begun.close()
    other = replace(config, draws=2)
    with pytest.raises(ModelError, match="begun otherwise: draws"):
        list(distill(teacher, images, tmp_path / "parted", other))
    *_, last = distill(teacher, images, tmp_path / "parted", config)
    assert last.loss == pytest.approx(whole[-1].loss, rel=1e-4)
    with pytest.raises(ModelError, match="made by distillation"):
        list(fit(shop / "pairs", tmp_path / "parted", TrainConfig(**trained(tmp_path / "parted"))))


def trained(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "config.json").read_text())["train"]
    return values | {"device": "cpu"}


def test_the_command_line_distills(run: Any, shop: Path) -> None:
    words = ("--steps", 2, "--teacher-steps", 4, "--draws", 1, "--updates", 2, "--device", "cpu")
    place = ("distill", "one", shop / "images", "--runs", shop / "runs", "--name", "two")
    status, out, err = run(*place, *words, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert (report["steps"], report["images"]) == (2, 2)
    assert "where they differed by" in err
    status, _, err = run(*place, *words)
    assert (status, "is there already" in err) == (1, True)
    # A mistyped folder removes nothing, nor does the teacher's own name.
    status, *_ = run("distill", "one", "nowhere", *place[3:], *words, "--overwrite")
    assert status == 1
    same = ("distill", "one", shop / "images", "--runs", shop / "runs", "--name", "one")
    status, _, err = run(*same, *words, "--overwrite")
    assert (status, "is the run that teaches" in err) == (1, True)
    for name in ("one", "two"):
        assert (shop / "runs" / name / "adapter" / "adapter_model.safetensors").is_file()
    assert run(*same[:-1], "../x", *words)[0] == 2
    assert run(*place, *words, "--overwrite")[0] == 0

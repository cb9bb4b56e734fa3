"""Self-distillation: the targets are the teacher's own way, and the student comes nearer to it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import cogvideox

from fewshot_rt.distill import distill, walk
from fewshot_rt.distill_config import DistillConfig
from fewshot_rt.errors import ConfigError, DataError, ModelError
from fewshot_rt.fit import fit
from fewshot_rt.images import write_image
from fewshot_rt.runs import open_attached, open_run
from fewshot_rt.sample import sample
from fewshot_rt.train_config import TrainConfig


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, workshop: Path) -> Path:
    """A run of the diffusion objective, and images without targets."""
    place = tmp_path_factory.mktemp("distill")
    options: dict[str, Any] = {"steps": 30, "batch": 2, "rank": 4, "variants": 2, "rate": 0.02}
    config = TrainConfig(
        base=str(workshop / "base"), objective="diffusion", hold_out=0, device="cpu", **options
    )
    *_, _ = fit(workshop / "pairs", place / "runs" / "one", config)
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
    found = walk(base, [image], prompt, recipe, config)
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
    assert run(*place, *words, "--overwrite")[0] == 0

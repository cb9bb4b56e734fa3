"""How few steps are enough: the choice counted by hand, and what a training leaves of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewshot_rt.errors import ConfigError, DataError
from fewshot_rt.fit import fit
from fewshot_rt.images import read_image
from fewshot_rt.ladder import Rung, choose, climb, write_curve
from fewshot_rt.runs import open_run, read_run
from fewshot_rt.task import Task
from fewshot_rt.train_config import TrainConfig
from fewshot_rt.trial import plan_trial


def rung(steps: int, errors: Any, sharpness: Any = (), noise: str = "seeded") -> Rung:
    scores = {"psnr": 20.0 + steps, "sharpness": 0.5}
    return Rung(steps, noise, scores, tuple(errors), tuple(sharpness), 1.0)


@pytest.mark.parametrize(
    ("rungs", "expected"),
    [
        # 2 % more is as good, 3 % is not.
        ([rung(1, [1.019]), rung(4, [1.0])], 1),
        ([rung(1, [1.03]), rung(4, [1.0])], 4),
        # Differences of -0.2 and 0.3 are chance, of 0.1 and 0.1 are not.
        ([rung(1, [0.8, 1.3]), rung(4, [1.0, 1.0])], 1),
        ([rung(1, [1.1, 1.1]), rung(4, [1.0, 1.0])], 4),
        # Worse on one image of eight alone is no chance, but up to a tenth may be.
        ([rung(1, [0.1] * 7 + [0.9]), rung(4, [0.1] * 8)], 4),
        ([rung(1, [1.0] * 7 + [1.7]), rung(4, [1.0] * 8)], 1),
        # A blur that errs least loses against sharp answers that err by a half more.
        ([rung(1, [1.0], [0.5]), rung(4, [1.5], [0.95])], 4),
        ([rung(1, [1.0], [0.9]), rung(4, [1.5], [0.95])], 1),
        # Nothing left to improve.
        ([rung(1, [0.0]), rung(2, [0.0])], 1),
    ],
)
def test_the_fewest_steps_that_are_as_good_are_chosen(rungs: list[Rung], expected: int) -> None:
    assert choose(rungs, trained_noise="zero").steps == expected
    assert choose(rungs[::-1], trained_noise="zero").steps == expected


def test_rungs_that_are_much_worse_do_not_matter() -> None:
    rungs = [rung(1, [0.1], [0.8]), rung(2, [0.14], [0.95])]
    alone = choose(rungs, trained_noise="zero")
    for error in (0.11, 0.15, 3.0):
        others = [rung(k, [error], [0.5]) for k in (4, 8, 16)]
        assert choose([*rungs, *others], trained_noise="zero") == alone


@pytest.mark.parametrize(
    ("zero", "trained", "expected"),
    [(1.01, "zero", "zero"), (1.01, "seeded", "seeded"), (1.05, "zero", "seeded")],
)
def test_of_two_kinds_of_noise_the_better_or_the_trained_one_is_chosen(
    zero: float, trained: str, expected: str
) -> None:
    rungs = [rung(1, [zero], noise="zero"), rung(1, [1.0]), rung(2, [1.0], noise="zero")]
    found = choose(rungs, trained_noise=trained)
    assert (found.steps, found.noise) == (1, expected)


def test_nothing_can_be_chosen_of_nothing() -> None:
    with pytest.raises(DataError, match="nothing was tried"):
        choose([], trained_noise="zero")


def make_task(tmp_path: Path, write_noise_pairs: Any, count: int, test: int = 0) -> Task:
    write_noise_pairs(tmp_path / "pairs", (32, 32))
    task = Task.load(tmp_path / "pairs")
    pairs = [replace(task.pairs[0], name=str(i)) for i in range(count)]
    tests = [replace(task.pairs[0], name=f"t{i}", split="test") for i in range(test)]
    return replace(task, pairs=(*pairs, *tests))


def test_pairs_that_were_not_drawn_are_tried_on_first(
    tmp_path: Path, write_noise_pairs: Any
) -> None:
    task = make_task(tmp_path, write_noise_pairs, 12)
    for shots, tried in ((5, 7), (2, 8), (1, 8)):
        chosen = task.shots(shots, 0)
        trial = plan_trial(task, chosen, None)
        assert (trial.learned, trial.apart, len(trial.tried)) == (chosen, None, tried)
        assert not set(chosen.pairs) & set(trial.tried)


@pytest.mark.parametrize(
    ("count", "test", "hold_out", "learned", "tried", "apart"),
    [
        (10, 0, None, 8, 2, None),
        (4, 0, None, 3, 1, None),
        (3, 0, None, 3, 1, 2),
        (2, 0, None, 2, 1, 1),
        (1, 0, None, 1, 1, None),
        (30, 0, 12, 18, 8, None),  # at most 8 are tried on
        (2, 0, 1, 1, 1, None),
        (10, 0, 0, 10, 0, None),
        (10, 20, None, 10, 8, None),
        (10, 3, 0, 10, 3, None),
        (10, 3, 2, 8, 2, None),
    ],
)
def test_pairs_to_try_on_are_not_learned_from(
    tmp_path: Path,
    write_noise_pairs: Any,
    count: int,
    test: int,
    hold_out: int | None,
    learned: int,
    tried: int,
    apart: int | None,
) -> None:
    task = make_task(tmp_path, write_noise_pairs, count, test)
    trial = plan_trial(task, task.shots(count, 0), hold_out)
    assert (len(trial.learned.pairs), len(trial.tried)) == (learned, tried)
    assert (trial.apart and len(trial.apart.pairs)) == apart
    learner = trial.apart or trial.learned
    overlap = set(learner.pairs) & set(trial.tried)
    assert bool(overlap) is not trial.is_held_out
    assert trial.is_held_out is (count > 1)


def test_one_pair_at_least_is_learned_from(tmp_path: Path, write_noise_pairs: Any) -> None:
    task = make_task(tmp_path, write_noise_pairs, 3)
    with pytest.raises(ConfigError, match="3 of 3 pairs cannot be held out"):
        plan_trial(task, task.shots(3, 0), 3)


def settings(workshop: Path, **options: Any) -> TrainConfig:
    given = {"steps": 3, "batch": 1, "rank": 2, "variants": 2, "device": "cpu"}
    return TrainConfig(base=str(workshop / "base"), **given | options)


def test_a_run_knows_how_few_steps_it_needs(workshop: Path, tmp_path: Path) -> None:
    """On the test pairs, which it has; what is stored is what the reopened run measures."""
    run = tmp_path / "one"
    *_, _ = fit(workshop / "pairs", run, settings(workshop, objective="grid"))
    curve = json.loads((run / "steps.json").read_text())
    tried = [(rung["steps"], rung["noise"]) for rung in curve["tried"]]
    assert tried == [(k, noise) for k in (1, 2, 4, 8, 16) for noise in ("zero", "seeded")]
    assert (curve["images"], curve["is_held_out"], curve["metric"]) == (2, True, "iou")
    predictor = open_run(run)
    assert (predictor.recipe.steps, predictor.recipe.noise) == (
        curve["recommended_steps"],
        curve["noise"],
    )
    pairs = Task.load(workshop / "pairs").split("test").pairs
    images, targets = ([read_image(getattr(p, n)) for p in pairs] for n in ("source", "target"))
    for stored, again in zip(curve["tried"], climb(predictor, images, targets), strict=True):
        assert stored["scores"] == pytest.approx(again.scores, abs=1e-6)
    assert read_image(run / "panels" / "steps.png").std() > 0


def test_three_pairs_lend_one_to_a_training_apart(workshop: Path, tmp_path: Path) -> None:
    """The adapter learns from all three; another one, let go, is tried on the one it lacks."""
    alone = tmp_path / "alone"
    for kind in ("input", "target"):
        for path in (workshop / "pairs" / "train" / kind).glob("*.png"):
            (alone / kind).mkdir(parents=True, exist_ok=True)
            (alone / kind / path.name).write_bytes(path.read_bytes())
    steps = list(fit(alone, tmp_path / "one", settings(workshop)))
    assert [s.stage for s in steps] == ["train"] * 4 + ["trial"] * 4 + ["try"] * 10
    assert len(read_run(tmp_path / "one")["task"]["pairs"]) == 3
    curve = json.loads((tmp_path / "one" / "steps.json").read_text())
    assert (curve["images"], curve["is_held_out"]) == (1, True)
    assert not (tmp_path / "one" / "trial").exists()
    plain = list(fit(alone, tmp_path / "two", settings(workshop, hold_out=0)))
    assert [s.stage for s in plain] == ["train"] * 4
    assert not (tmp_path / "two" / "steps.json").exists()
    assert [s.loss for s in plain[1:]] == [s.loss for s in steps[1:4]]


def test_the_command_line_tells(run: Any) -> None:
    base = ("--base", "base", "--steps", 2, "--batch", 1, "--rank", 2, "--variants", 2)
    status, out, err = run("train", "pairs", "--name", "a", *base, "--json")
    assert status == 0
    assert json.loads(out)["recommended_steps"] in (1, 2, 4, 8, 16)
    assert "held-out images" in err
    for steps in ("auto", "3"):
        status, *_ = run("predict", "pairs/test/input", "--out", steps, "--steps", steps)
        assert status == 0
    status, _, err = run("predict", "pairs/test/input", "--steps", "none")
    assert (status, "neither auto nor a number" in err) == (2, True)


def test_the_picture_shows_what_was_tried(tmp_path: Path) -> None:
    rungs = [rung(k, [1 / k], [0.5], noise=n) for k in (1, 2, 4) for n in ("zero", "seeded")]
    chosen = write_curve(tmp_path, rungs, metric="psnr", trained_noise="zero", is_held_out=True)
    assert chosen.steps == 4
    picture = read_image(tmp_path / "panels" / "steps.png")
    assert picture.shape == (300, 720, 3)
    assert (np.unique(picture.reshape(-1, 3), axis=0)).shape[0] > 4

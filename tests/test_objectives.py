"""The losses in closed form, with predictors that know the answer, and what is trained by them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewshot_rt.errors import ConfigError
from fewshot_rt.fit import fit
from fewshot_rt.objectives import choose_loss, diffusion_loss, grid_loss, onestep_loss
from fewshot_rt.runs import open_run
from fewshot_rt.schedule import Schedule
from fewshot_rt.train_config import TrainConfig

CLEAN = torch.randn(3, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
FLOW, V = Schedule(kind="flow"), Schedule(kind="v")
SCHEDULES = pytest.mark.parametrize("schedule", [FLOW, V], ids=["flow", "v"])


def dice(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@SCHEDULES
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_onestep_is_zero_for_the_right_answer(schedule: Schedule, start: float) -> None:
    """Where x is zero, the noise is -a / b clean, and the target follows from it."""

    def ideal(noisy: Tensor, moment: Tensor) -> Tensor:
        assert moment.tolist() == [start] * 3
        a, b = schedule.coefficients(start)
        target: Tensor = schedule.target(CLEAN, -a / b * CLEAN, start)
        return target + 0 * noisy

    loss = onestep_loss(schedule, ideal, CLEAN, dice(), 1, start=start)
    assert float(loss) < 1e-12


def test_onestep_counts_a_constant_error_once() -> None:
    """An even error has no gradient: the loss is its square, on the frames that count."""
    error = torch.zeros_like(CLEAN)
    error[:, :, 1:] = 0.3
    error[:, :, :1] = 100.0  # known frames do not count
    loss = onestep_loss(FLOW, lambda x, t: -(CLEAN + error), CLEAN, dice(), 1)
    assert float(loss) == pytest.approx(0.09, rel=1e-5)


def test_pixels_count_as_they_are_decoded() -> None:
    """A decoder that triples: an error of 0.3 is one of 0.9 in pixels, and of 0.09 in latents."""

    def decode(latents: Tensor) -> Tensor:
        return 3 * latents[:, :3, -1]

    loss = onestep_loss(
        FLOW, lambda x, t: -(CLEAN + 0.3), CLEAN, dice(), 0, pixels=2.0, decode=decode
    )
    assert float(loss) == pytest.approx(0.09 + 2 * 0.9, rel=1e-5)


def test_diffusion_compares_with_the_schedules_target() -> None:
    """For clean = 0 the flow target is the noise itself, x_t / t: a known answer."""
    zero, generator = torch.zeros_like(CLEAN), dice()

    def ideal(noisy: Tensor, moment: Tensor) -> Tensor:
        return noisy / moment[:, None, None, None, None]

    assert float(diffusion_loss(FLOW, ideal, zero, generator, 1)) < 1e-10
    blind = diffusion_loss(FLOW, lambda x, t: 0 * x, zero, generator, 1)
    assert float(blind) == pytest.approx(1.0, abs=0.25)  # the noise's own variance


@SCHEDULES
def test_a_grid_learns_at_the_times_of_its_sampler_and_half_at_pure_noise(
    schedule: Schedule,
) -> None:
    """For clean = 0 the target is the noise times one (flow) or a (v): a known answer."""
    schedule = replace(schedule, shift=2.0) if schedule.kind == "flow" else schedule
    zero, generator, seen = torch.zeros(64, 2, 2, 2, 2), dice(), Counter[float]()

    def ideal(noisy: Tensor, moment: Tensor) -> Tensor:
        seen.update(round(t, 5) for t in moment.tolist())
        a, b = schedule.coefficients(moment)
        weight = (1 / b) if schedule.kind == "flow" else a / b
        return noisy * weight[:, None, None, None, None]

    losses = [float(grid_loss(schedule, ideal, zero, generator, 0, steps=4)) for _ in range(20)]
    assert max(losses) < 1e-9
    assert set(seen) == {round(t, 5) for t in schedule.times(4)[:-1]}
    assert seen[1.0] / seen.total() == pytest.approx(5 / 8, abs=0.03)


def test_a_grid_knows_how_the_size_of_a_video_shifts_its_times() -> None:
    schedule, seen = Schedule(kind="flow", growth=(0.1, 0.0)), set[float]()

    def note(noisy: Tensor, moment: Tensor) -> Tensor:
        seen.update(round(t, 5) for t in moment.tolist())
        return noisy

    for seed in range(9):
        grid_loss(schedule, note, CLEAN, dice(seed), 0, steps=3)
    assert seen == {round(t, 5) for t in schedule.at(2 * 8 * 8).times(3)[:-1]}


def test_pixels_want_a_tiny_decoder(tiny_base: Any) -> None:
    config = TrainConfig(pixel_loss=0.1)
    assert callable(choose_loss(config, tiny_base))
    tiny_base.tiny_roles = ()
    with pytest.raises(ConfigError, match="--vae"):
        choose_loss(config, tiny_base)


@pytest.mark.parametrize(
    ("settings", "recipe"),
    [
        ({"objective": "onestep", "start": 0.5, "pixel_loss": 0.1}, (1, "zero", 0.5)),
        ({"objective": "grid", "grid_steps": 3}, (3, "seeded", 1.0)),
        ({"objective": "diffusion"}, (8, "seeded", 1.0)),
    ],
)
def test_runs_answer_as_they_were_trained(
    workshop: Path, tmp_path: Path, settings: dict[str, Any], recipe: tuple[Any, ...]
) -> None:
    config = TrainConfig(
        base=str(workshop / "base"), steps=2, batch=1, rank=2, variants=2, device="cpu", **settings
    )
    *_, _ = fit(workshop / "pairs", tmp_path / "one", config)
    found = open_run(tmp_path / "one").recipe
    assert (found.trained_steps, found.trained_noise, found.start) == recipe


@pytest.mark.parametrize("settings", [{"start": 0.0}, {"start": 1.1}, {"pixel_loss": -1.0}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        TrainConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"objective": "diffusion", "start": 0.5}, "--start belongs to the objective onestep"),
        ({"objective": "grid", "pixel_loss": 0.1}, "--pixel-loss belongs to the objective onestep"),
        ({"grid_steps": 8}, "--grid-steps belongs to the objective grid"),
    ],
)
def test_settings_of_another_objective_are_refused_before_anything_is_removed(
    workshop: Path, tmp_path: Path, settings: dict[str, Any], hint: str
) -> None:
    options: dict[str, Any] = {"steps": 1, "batch": 1, "rank": 2, "variants": 1, "device": "cpu"}
    config = TrainConfig(base=str(workshop / "base"), hold_out=0, **options)
    run = tmp_path / "one"
    *_, _ = fit(workshop / "pairs", run, config)
    with pytest.raises(ConfigError, match=hint):
        next(fit(workshop / "pairs", run, replace(config, **settings), overwrite=True))
    assert open_run(run).recipe.steps == 1

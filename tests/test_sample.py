"""Reference: Gaussian data N(mu, s²), whose ideal predictor and whose exact flow are closed forms.

x_t is N(a mu, v) with v = a² s² + b², so E[clean | x] = mu + a s² / v (x - a mu) and
E[noise | x] = b / v (x - a mu); along the flow (x - a mu) / sqrt(v) stays as it is, so that noise
x_1 ends at mu + s x_1.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fewshot_rt.sample import sample
from fewshot_rt.schedule import Schedule

MEAN, SPREAD = 0.7, 0.4
SCHEDULES = {
    "flow": Schedule(kind="flow"),
    "flow-shifted": Schedule(kind="flow", shift=2.0),
    "v": Schedule(kind="v"),
}
ALL = pytest.mark.parametrize("name", SCHEDULES)
NOISE = np.random.default_rng(0).normal(size=(4, 2, 1, 3, 5))


def ideal(schedule: Schedule) -> Callable[[Any, Any], Any]:
    """Make the predictor that is right on average: E[target | x, t]."""

    def denoise(noisy: Any, time: Any) -> Any:
        a, b = (c.reshape(-1, 1, 1, 1, 1) for c in schedule.coefficients(time))
        variance = a**2 * SPREAD**2 + b**2
        clean = MEAN + a * SPREAD**2 / variance * (noisy - a * MEAN)
        noise = b / variance * (noisy - a * MEAN)
        return noise - clean if schedule.kind == "flow" else a * noise - b * clean

    return denoise


def error_after(schedule: Schedule, steps: int) -> float:
    *_, last = sample(ideal(schedule), NOISE, schedule=schedule, steps=steps)
    return float(np.abs(last.latents - (MEAN + SPREAD * NOISE)).max())


@ALL
def test_the_error_halves_as_the_steps_double(name: str) -> None:
    errors = [error_after(SCHEDULES[name], steps) for steps in (50, 100, 200, 400)]
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios, 2, rtol=0.05)
    assert error_after(SCHEDULES[name], 2000) < 2e-3


@ALL
def test_one_step_goes_to_the_mean(name: str) -> None:
    (only,) = sample(ideal(SCHEDULES[name]), NOISE, schedule=SCHEDULES[name], steps=1)
    np.testing.assert_allclose(only.latents, np.full_like(NOISE, MEAN), atol=1e-12)


@ALL
def test_numpy_and_torch_agree(name: str) -> None:
    schedule, noise = SCHEDULES[name], NOISE.astype(np.float32)
    ours = list(sample(ideal(schedule), noise, schedule=schedule, steps=4))
    theirs = list(sample(ideal(schedule), torch.from_numpy(noise), schedule=schedule, steps=4))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.index, one.time) == (other.index, other.time)
        assert one.latents.dtype == np.float32
        assert other.latents.dtype == torch.float32
        np.testing.assert_allclose(one.latents, other.latents, atol=1e-6)


def test_each_step_is_told_and_computed_only_when_asked_for() -> None:
    schedule, seen = SCHEDULES["flow-shifted"], []

    def denoise(latents: np.ndarray, time: np.ndarray) -> np.ndarray:
        assert time.dtype == latents.dtype
        assert time.shape == latents.shape[:1]
        seen.append(float(time[0]))
        return 0 * latents

    steps = sample(denoise, NOISE, schedule=schedule, steps=3)
    assert seen == []
    first = next(steps)
    assert (first.index, first.time) == (0, schedule.times(3)[1])
    assert seen == [1.0]
    rest = list(steps)
    assert [step.index for step in rest] == [1, 2]
    assert rest[-1].time == 0
    np.testing.assert_allclose(seen, schedule.times(3)[:-1])
    # Nothing is predicted to change, so nothing does.
    np.testing.assert_allclose(rest[-1].latents, NOISE, rtol=1e-12)


def test_the_gradient_flows_back_to_the_noise() -> None:
    schedule, noise = SCHEDULES["flow"], torch.from_numpy(NOISE).requires_grad_()
    *_, last = sample(ideal(schedule), noise, schedule=schedule, steps=400)
    last.latents.sum().backward()
    # The exact flow has derivative s everywhere.
    torch.testing.assert_close(noise.grad, torch.full_like(noise, SPREAD), rtol=1e-2, atol=0)


def error_of_dpm(schedule: Schedule, steps: int) -> float:
    *_, last = sample(ideal(schedule), NOISE, schedule=schedule, steps=steps, solver="dpm")
    return float(np.abs(last.latents - (MEAN + SPREAD * NOISE)).max())


@ALL
def test_the_second_order_is_one(name: str) -> None:
    """The error falls nearly to a quarter where that of the first order halves, and is lower.

    A quarter but for logarithms: the ratio of signal and noise has no bounds at the ends.
    """
    errors = [error_of_dpm(SCHEDULES[name], steps) for steps in (256, 512, 1024)]
    assert all(first / second > 3.2 for first, second in pairwise(errors)), errors
    assert error_of_dpm(SCHEDULES[name], 16) < error_after(SCHEDULES[name], 16) / 3
    for steps in (1, 2, 3):
        assert error_of_dpm(SCHEDULES[name], steps) == pytest.approx(
            error_after(SCHEDULES[name], steps)
        )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 20])
@pytest.mark.parametrize("kind", ["flow", "v"])
def test_diffusers_solver_goes_the_same_way(kind: str, steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    kinds: dict[str, dict[str, Any]] = {
        # diffusers takes times from 0.999 on.
        "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        "v": {
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
    }
    official: Any = DPMSolverMultistepScheduler(**kinds[kind])
    powers = official.alphas_cumprod.double().tolist()
    schedule = (
        Schedule(kind="flow")
        if kind == "flow"
        else Schedule(kind="v", signal_power=(*powers[:-1], 0.0))
    )
    start = 0.999 if kind == "flow" else 1.0
    denoise, noise = ideal(schedule), torch.from_numpy(NOISE)
    walked = list(sample(denoise, noise, schedule=schedule, steps=steps, solver="dpm", start=start))
    official.set_timesteps(steps)
    latents, time = noise, start
    for moment, ours in zip(official.timesteps, walked, strict=True):
        prediction = denoise(latents, torch.full((len(noise),), time, dtype=torch.float64))
        latents = official.step(prediction, moment, latents).prev_sample
        # diffusers keeps 2^-24 of the signal's power at pure noise, we nothing.
        torch.testing.assert_close(
            ours.latents, latents, rtol=0, atol=1e-3 if kind == "v" else 2e-6
        )
        time = ours.time

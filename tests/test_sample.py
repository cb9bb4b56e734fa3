"""Reference: Gaussian data N(mu, s²), whose ideal predictor and whose exact flow are closed forms.

x_t is N(a mu, v) with v = a² s² + b², so E[clean | x] = mu + a s² / v (x - a mu) and
E[noise | x] = b / v (x - a mu); along the flow (x - a mu) / sqrt(v) stays as it is, so that noise
x_1 ends at mu + s x_1.
"""

from collections.abc import Callable
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

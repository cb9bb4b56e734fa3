"""References: the schedulers of diffusers, and formulas written out for both kinds."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from fewshot_rt.errors import ConfigError
from fewshot_rt.schedule import COSINE_POWER, Schedule

FLOW, V = Schedule(kind="flow"), Schedule(kind="v")
BOTH = pytest.mark.parametrize("schedule", [FLOW, V], ids=["flow", "v"])
SHAPE = (3, 2, 2, 3, 1)  # [B, C, F, h, w]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_coefficients_are_the_formulas() -> None:
    time = np.array([0, 0.001, 0.25, 0.5, 0.999, 1])
    a, b = FLOW.coefficients(time)
    np.testing.assert_array_equal(a, 1 - time)
    np.testing.assert_array_equal(b, time)
    a, b = V.coefficients(time)
    np.testing.assert_allclose(a, np.cos(math.pi / 2 * time), atol=1e-12)
    np.testing.assert_allclose(b, np.sin(math.pi / 2 * time), atol=1e-12)


def test_power_is_linear_between_the_entries() -> None:
    schedule = Schedule(kind="v", signal_power=(0.5, 0.1, 0.0))
    a, _ = schedule.coefficients(np.array([0, 1 / 6, 1 / 3, 0.5, 2 / 3, 1]))
    np.testing.assert_allclose(a**2, [1, 0.75, 0.5, 0.3, 0.1, 0], atol=1e-15)


@BOTH
def test_the_ends_are_clean_and_pure_noise(schedule: Schedule) -> None:
    clean, noise = draw(*SHAPE), draw(*SHAPE, seed=1)
    for end in (1, 1.0, np.ones(3, np.float32)):
        np.testing.assert_array_equal(schedule.noise(clean, noise, end), noise)
    for start in (0, 0.0, np.zeros(3, np.float32)):
        np.testing.assert_array_equal(schedule.noise(clean, noise, start), clean)


def test_targets_are_the_formulas() -> None:
    clean, noise, time = draw(*SHAPE), draw(*SHAPE, seed=1), np.array([0, 0.3, 1], np.float32)
    np.testing.assert_array_equal(FLOW.target(clean, noise, time), noise - clean)
    angle = (math.pi / 2 * time).reshape(-1, 1, 1, 1, 1)
    expected = np.cos(angle) * noise - np.sin(angle) * clean
    np.testing.assert_allclose(V.target(clean, noise, time), expected, atol=1e-6)


@BOTH
@pytest.mark.parametrize("time", [np.array([0.1, 0.5, 1.0], np.float32), 0.7, 1])
def test_split_undoes_noise(schedule: Schedule, time: Any) -> None:
    clean, noise = draw(*SHAPE), draw(*SHAPE, seed=1)
    noisy = schedule.noise(clean, noise, time)
    found_clean, found_noise = schedule.split(noisy, schedule.target(clean, noise, time), time)
    np.testing.assert_allclose(found_clean, clean, atol=1e-6)
    np.testing.assert_allclose(found_noise, noise, atol=1e-6)


@BOTH
def test_a_step_with_the_true_prediction_stays_on_the_path(schedule: Schedule) -> None:
    clean, noise = draw(*SHAPE), draw(*SHAPE, seed=1)
    target = schedule.target(clean, noise, 0.8)
    stepped = schedule.step(schedule.noise(clean, noise, 0.8), target, 0.8, 0.35)
    np.testing.assert_allclose(stepped, schedule.noise(clean, noise, 0.35), atol=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_and_torch_agree_and_keep_the_type(schedule: Schedule, dtype: torch.dtype) -> None:
    arrays = [torch.from_numpy(draw(*SHAPE, seed=seed)).to(dtype) for seed in range(3)]
    clean, noise, prediction = arrays
    time = torch.tensor([0.0, 0.4, 1.0], dtype=dtype)
    calls = (
        ("noise", (clean, noise, time)),
        ("target", (clean, noise, time)),
        ("step", (clean, prediction, time, time / 2)),
        ("step", (clean, prediction, 1.0, 0.25)),
    )
    for name, arguments in calls:
        result = getattr(schedule, name)(*arguments)
        plain = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
        expected = getattr(schedule, name)(*plain)
        assert result.dtype == dtype
        assert expected.dtype == clean.numpy().dtype
        np.testing.assert_allclose(result, expected, atol=1e-6)


@BOTH
def test_half_types_are_kept_too(schedule: Schedule) -> None:
    clean, noise = torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16)
    time = torch.tensor([0.25, 0.5], dtype=torch.bfloat16)
    noisy = schedule.noise(clean, noise, time)
    assert noisy.dtype == torch.bfloat16
    expected = schedule.coefficients(np.array([0.25, 0.5]))[0]
    np.testing.assert_allclose(noisy[:, 0].float(), expected, rtol=2**-8)


@BOTH
@pytest.mark.parametrize("time", [-0.001, 1.0001, math.nan, np.array([0.5, 2]), torch.tensor([-1])])
def test_times_outside_are_refused(schedule: Schedule, time: Any) -> None:
    sample = torch.zeros(1, 2) if isinstance(time, torch.Tensor) else np.zeros((1, 2))
    for call in (schedule.noise, schedule.split):
        with pytest.raises(ValueError, match=r"time must be in \[0, 1\]"):
            call(sample, sample, time)


@BOTH
def test_the_gradient_is_that_of_the_formula(schedule: Schedule) -> None:
    clean = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    noise, time = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0.25, 0.75]).double()
    a, b = schedule.coefficients(time)
    schedule.noise(clean, noise, time).sum().backward()
    torch.testing.assert_close(clean.grad, a[:, None].expand(2, 3))
    clean.grad = None
    schedule.target(clean, noise, time).sum().backward()
    expected = -torch.ones_like(noise) if schedule.kind == "flow" else -b[:, None].expand(2, 3)
    torch.testing.assert_close(clean.grad, expected)


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_times_run_from_exactly_one_to_exactly_zero(shift: float, steps: int) -> None:
    times = Schedule(shift=shift).times(steps)
    assert len(times) == steps + 1
    assert times[0] == 1
    assert times[-1] == 0
    assert list(times) == sorted(times, reverse=True)


def test_times_without_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        FLOW.times(0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_flow_is_the_euler_scheduler_of_diffusers(shift: float, steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    # Trailing times, as the pipelines of Flux and Wan ask for them.
    reference.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    schedule = Schedule(kind="flow", shift=shift)
    times = schedule.times(steps)
    np.testing.assert_allclose(times, reference.sigmas, atol=1e-6)
    ours = theirs = torch.from_numpy(draw(*SHAPE))
    for index, timestep in enumerate(reference.timesteps):
        prediction = torch.from_numpy(draw(*SHAPE, seed=index + 1))
        theirs = reference.step(prediction, timestep, theirs).prev_sample
        ours = schedule.step(ours, prediction, times[index], times[index + 1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("cells", [2, 660, 5000])
@pytest.mark.parametrize("last", [0.0, 0.1])
@pytest.mark.parametrize("steps", [2, 4, 7])
def test_growth_and_last_are_the_dynamic_shift_of_diffusers(
    cells: int, last: float, steps: int
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    sizes = {"base_image_seq_len": 1024, "max_image_seq_len": 4096}
    reference = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=last or None, **sizes
    )
    mu = calculate_shift(cells, *sizes.values(), 0.95, 2.05)
    reference.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    slope = (2.05 - 0.95) / (4096 - 1024)
    schedule = Schedule(kind="flow", growth=(slope, 0.95 - slope * 1024), last=last)
    np.testing.assert_allclose(schedule.at(cells).times(steps), reference.sigmas, atol=1e-6)
    assert schedule.at(cells).at(1) == schedule.at(cells)


def test_one_step_with_a_last_time_goes_all_the_way() -> None:
    assert Schedule(shift=3.0, last=0.1).times(1) == (1, 0)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_linear_quadratic_times_are_those_of_ltx(steps: int) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

    times = Schedule(kind="flow", spacing="linear_quadratic").times(steps)
    np.testing.assert_allclose(times, [*linear_quadratic_schedule(steps).tolist(), 0], atol=1e-6)


@pytest.mark.parametrize("name", ["DDIMScheduler", "CogVideoXDDIMScheduler"])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_v_is_the_ddim_scheduler_of_diffusers(name: str, steps: int) -> None:
    import diffusers

    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    reference = getattr(diffusers, name)(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        **options,
    )
    reference.set_timesteps(steps)
    power = tuple(reference.alphas_cumprod.double().tolist())
    schedule = Schedule(kind="v", signal_power=power)
    times = schedule.times(steps)
    np.testing.assert_allclose(times[:-1], (reference.timesteps.numpy() + 1) / len(power))
    ours = theirs = torch.from_numpy(draw(*SHAPE))
    for index, timestep in enumerate(reference.timesteps):
        prediction = torch.from_numpy(draw(*SHAPE, seed=index + 1))
        theirs = reference.step(prediction, timestep, theirs)[0]
        ours = schedule.step(ours, prediction, times[index], times[index + 1])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "schedule",
    [
        FLOW,
        V,
        Schedule(shift=3.0),
        Schedule(growth=(0.001, 0.5), last=0.1),
        Schedule(spacing="linear_quadratic"),
        Schedule(kind="v", signal_power=(0.5, 0.0)),
    ],
)
def test_a_schedule_survives_json(schedule: Schedule) -> None:
    values = json.loads(json.dumps(schedule.to_dict()))
    assert Schedule.from_dict(values) == schedule
    assert ("signal_power" in values) == (schedule.signal_power != COSINE_POWER)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "flows"}, "unknown schedule 'flows'. Did you mean 'flow'"),
        ({"shift": 0.0}, "shift must be above 0, not 0.0"),
        ({"kind": "v", "signal_power": (0.9, 0.0047)}, "zero terminal SNR.*0.0047"),
    ],
)
def test_wrong_schedules_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**values)

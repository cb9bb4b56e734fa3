"""References: torch's AdamW step by step, closed forms of the rate and the average."""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewshot_rt.optimise import Optimiser, Pace

LEVEL = Pace(rate=0.1, warmup=0)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(model: nn.Module, step: int) -> Tensor:
    data = torch.randn(4, 9, generator=torch.Generator().manual_seed(step))
    loss: Tensor = (model(data[:, :6]) - data[:, 6:]).square().mean()
    return loss


@pytest.mark.parametrize(
    ("step", "progress", "expected"),
    [
        (0, 0.0, 0.2 * 1 / 4),
        (2, 0.0, 0.2 * 3 / 4),
        (3, 0.0, 0.2),
        (50, 0.6, 0.2),
        (60, 0.7, 0.2 * (1 - 0.9 * 0.25)),
        (80, 0.8, 0.2 * (1 - 0.9 * 0.5)),
        (99, 1.0, 0.2 * 0.1),
        (120, 1.3, 0.2 * 0.1),
        (1, 0.8, 0.2 * 2 / 4 * (1 - 0.9 * 0.5)),
    ],
)
def test_the_pace(step: int, progress: float, expected: float) -> None:
    pace = Pace(rate=0.2, warmup=4, decay=0.4, last=0.1)
    assert pace.at(step, progress) == pytest.approx(expected)


def test_the_pace_without_warm_up_and_decay_is_level() -> None:
    assert {LEVEL.at(step, progress) for step in (0, 9) for progress in (0.0, 1.0)} == {0.1}


def test_steps_are_those_of_adamw_with_a_clip_and_a_pace() -> None:
    ours, theirs = network(), network()
    pace = Pace(rate=0.05, warmup=3, decay=0.5)
    optimiser = Optimiser(ours.named_parameters(), pace=pace, clip=0.3, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(8):
        norm = optimiser.step(loss_of(ours, step), progress=step / 8)
        reference.zero_grad()
        loss_of(theirs, step).backward()  # type: ignore[no-untyped-call]
        gradients = torch.cat([p.grad.flatten() for p in theirs.parameters() if p.grad is not None])
        assert norm == pytest.approx(float(gradients.norm()), rel=1e-5)
        for parameter in theirs.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.3 / float(gradients.norm()))
        reference.param_groups[0]["lr"] = pace.at(step, step / 8)
        reference.step()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-6)


def test_the_average_is_its_closed_form() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimiser = Optimiser([("weight", weight)], pace=LEVEL, average=0.6)
    expected = weight.detach().clone()
    for step in range(1, 30):
        optimiser.step(weight.square().sum())
        keep = min(0.6, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weight.detach()
        torch.testing.assert_close(optimiser.averaged()["weight"], expected)
    assert not torch.equal(expected, weight)


def test_without_an_average_the_weights_themselves_are_given() -> None:
    model = network()
    optimiser = Optimiser(model.named_parameters(), pace=LEVEL)
    optimiser.step(loss_of(model, 0))
    averaged = optimiser.averaged()
    assert set(averaged) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(averaged[name], parameter)
        assert not averaged[name].requires_grad


def test_muon_turns_named_matrices_evenly_and_leaves_the_rest_to_adamw() -> None:
    ours, theirs = network(), network()
    start = ours.get_parameter("0.weight").detach().clone()
    Optimiser(ours.named_parameters(), pace=LEVEL, muon=("0.",)).step(loss_of(ours, 0))
    Optimiser(theirs.named_parameters(), pace=LEVEL).step(loss_of(theirs, 0))
    for name in ("0.bias", "2.weight", "2.bias"):
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name))
    # Liu et al. 2025: an orthogonal update x 0.2 sqrt(max(rows, columns)). Newton and Schulz's
    # five rounds bring the singular values to about 1.
    update = (start - ours.get_parameter("0.weight").detach()) / (0.1 * 0.2 * math.sqrt(6))
    singular = torch.linalg.svdvals(update)[:4]  # four samples give a gradient of rank four
    assert bool(((singular > 0.6) & (singular < 1.3)).all()), singular


@pytest.mark.parametrize("muon", [(), ("0.",)])
def test_going_on_is_bit_identical(muon: tuple[str, ...]) -> None:
    options: dict[str, Any] = {
        "pace": Pace(rate=0.03, warmup=6, decay=0.3),
        "average": 0.9,
        "weight_decay": 0.01,
        "muon": muon,
    }
    model = network()
    optimiser = Optimiser(model.named_parameters(), **options)
    for step in range(4):
        optimiser.step(loss_of(model, step), progress=step / 8)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, file)
    for step in range(4, 8):
        optimiser.step(loss_of(model, step), progress=step / 8)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(state["model"])
    again = Optimiser(resumed.named_parameters(), **options)
    again.load_state_dict(state["optimiser"])
    for step in range(4, 8):
        again.step(loss_of(resumed, step), progress=step / 8)
    assert again.step_count == optimiser.step_count == 8
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))
        assert torch.equal(optimiser.averaged()[name], again.averaged()[name])

"""Figures of `bench base` for bases that copy, know everything, or keep pictures exactly."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewshot_rt.benchmarks.base_quality import measure_autoencoder, measure_events
from fewshot_rt.errors import ConfigError
from fewshot_rt.metrics import MOST_PSNR
from fewshot_rt.schedule import Schedule
from fewshot_rt.world import EVENTS


class Fake:
    """Latents are the first and the last frame; blurred: the last comes back at half its level."""

    name, revision, schedule = "fake", "0", Schedule(kind="flow")
    geometry = SimpleNamespace(native=(32, 32), multiple=8)

    def __init__(self, *, knows: bool, level: float = 1.0) -> None:
        self.knows, self.level = knows, level
        self.latents = torch.empty(0)

    def embed(self, prompt: str) -> dict[str, Tensor]:
        assert prompt in EVENTS
        return {}

    def encode(self, video: Tensor) -> Tensor:
        self.latents = video[:, :, [0, -1]]
        return self.latents

    def condition(self, image: Tensor, *, frames: int) -> dict[str, Tensor]:
        return {"first": image[:, :, None]}

    def decode_last(self, latents: Tensor) -> Tensor:
        return latents[:, :, -1] * self.level

    def denoiser(self) -> Any:
        def predict(noisy: Tensor, time: Tensor, first: Tensor) -> Tensor:
            assert not noisy.any()
            assert (time == 1).all()
            return -(self.latents if self.knows else first.expand(-1, -1, 2, -1, -1))

        return predict


def test_a_base_that_knows_all_is_as_good_as_its_autoencoder() -> None:
    record = measure_events(Fake(knows=True), count=2)
    assert set(record.variants) == {"all events", *EVENTS}
    for values in record.variants.values():
        assert values == pytest.approx({"skill": 1, "autoencoder": 1})
    blurred = measure_events(Fake(knows=True, level=0.9), count=2)
    for values in blurred.variants.values():
        assert values["skill"] == pytest.approx(values["autoencoder"])
        assert values["skill"] < 1


def test_a_base_that_copies_has_no_skill() -> None:
    record = measure_events(Fake(knows=False), count=4)
    for event in EVENTS:
        values = record.variants[event]
        assert -1 <= values["skill"] <= 1e-6, event
        assert values["autoencoder"] == pytest.approx(1)
    # Nothing beats copying where little changes.
    assert record.variants["vanish-kind"]["skill"] == pytest.approx(0)


def test_an_exact_autoencoder_keeps_everything() -> None:
    record = measure_autoencoder(Fake(knows=True), count=4)
    for values in record.variants.values():
        assert values == pytest.approx({"psnr": MOST_PSNR, "ssim": 1})
    assert set(record.variants) == {"world", "photographs"}


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        measure_events(Fake(knows=True), count=2, size=36)

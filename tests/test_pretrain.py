"""Pretraining from inside: what is drawn, shared and gone on from. References: counts, equality."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewshot_rt import pretrain as module
from fewshot_rt.errors import ConfigError
from fewshot_rt.pretrain import _Run, pretrain
from fewshot_rt.pretrain_config import PretrainConfig
from fewshot_rt.pretrain_losses import denoising_loss
from fewshot_rt.world import VOCABULARY

SMALL: dict[str, Any] = {
    "autoencoder": "pocket",
    "compile": False,
    "layers": 1,
    "heads": 1,
    "native": 32,
    "batch": 8,
}


def new_run(folder: Path, **settings: Any) -> _Run:
    return _Run(PretrainConfig(**SMALL | settings), folder, rank=0, processes=1)


def test_clips_are_at_the_last_time_and_silent_as_often_as_asked() -> None:
    config = PretrainConfig(zero_noise=0.5, pure_noise=0.2, silent_words=0.25)
    seen: dict[str, torch.Tensor] = {}

    def predict(noisy: torch.Tensor, moment: torch.Tensor, first: Any, words: Any) -> torch.Tensor:
        seen.update(noisy=noisy, moment=moment, words=words)
        return torch.zeros_like(noisy)

    count = 2000
    latents = torch.ones(count, 12, 2, 2, 2)
    mirror, slowly = VOCABULARY.index("mirror"), VOCABULARY.index("slowly")
    words = torch.tensor([mirror, slowly]).expand(count, -1)
    generator = torch.Generator().manual_seed(0)
    denoising_loss(predict, (latents, words), config=config, generator=generator)
    is_zero = (seen["noisy"] == 0).flatten(1).all(dim=1)
    is_last = seen["moment"] == 1
    assert bool((is_last | ~is_zero).all())
    # Within 5 standard deviations.
    for share, expected in (
        (is_zero, 0.5),
        (is_last, 0.7),
        (seen["words"][:, 0] == 0, 0.25),
    ):
        assert abs(float(share.float().mean()) - expected) < 5 * (expected / count) ** 0.5
    assert set(seen["words"][:, 0].tolist()) == {0, mirror}
    assert set(seen["words"][:, 1].tolist()) == {slowly}


def test_a_named_event_is_said_as_a_prompt_says_it(tmp_path: Path) -> None:
    """The words in training and `embed` of the base that is written must be one."""
    run = new_run(tmp_path)
    run.save()
    base = module.open_base(str(tmp_path))
    noisy, first = torch.zeros(1, 12, 2, 4, 4), torch.randn(1, 12, 1, 4, 4)
    moment = torch.ones(1)
    for prompt, words in (
        ("mirror", ("mirror", "")),
        ("mirror slowly", ("mirror", "slowly")),
        ("slowly", ("", "slowly")),
        ("", ("", "")),
    ):
        told = torch.tensor([[VOCABULARY.index(word) for word in words]])
        found = run.denoiser(noisy, moment, first, told)
        expected = base.denoiser()(noisy, moment, first, **base.embed(prompt))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=5e-3)  # written in fp16


def test_new_clips_are_made_many_at_once(tmp_path: Path) -> None:
    run = new_run(tmp_path, repeats=4)
    made: list[int] = []
    clips = run._clips
    run._clips = lambda count, size: (made.append(count), clips(count, size))[1]  # type: ignore[method-assign]
    for _ in range(1 + 3 * 4):
        run._refill(32, 16)
    # The first time, then 8 more a step: as many as drawn / repeats, never fewer than 32 at once.
    assert made == [128, 32, 32, 32]


def test_a_batch_that_processes_cannot_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "join", lambda device: (0, 3))
    with pytest.raises(ConfigError, match="--batch 24"):
        next(pretrain(PretrainConfig(**SMALL | {"batch": 32}), tmp_path))


def test_a_state_of_another_device_goes_on_with_other_clips(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.origin["initialised_from"] = ["somewhere"]
    run.save()
    path = tmp_path / "state" / "pretrain.pt"
    torch.save(torch.load(path, weights_only=True) | {"device": "cuda"}, path)
    again = new_run(tmp_path)
    torch.testing.assert_close(again.generator.get_state(), run.generator.get_state())
    again.resume()
    assert again.origin == run.origin
    for name, value in run.denoiser.state_dict().items():
        assert torch.equal(value, again.denoiser.state_dict()[name])
    assert not torch.equal(run.generator.get_state(), again.generator.get_state())

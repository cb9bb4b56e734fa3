"""References: counts, and what a uniform draw must give."""

import torch

from fewshot_rt.replay import FULL, Replay


def clips(start: int, count: int, *, side: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips whose latents and words both say their number."""
    words = torch.arange(start, start + count)
    return words.float().view(-1, 1, 1, 1, 1).expand(-1, 3, 2, side, side), words


def test_it_gives_back_what_went_in_evenly() -> None:
    replay, generator = Replay(), torch.Generator().manual_seed(0)
    assert replay.lacks(2)
    replay.add(*clips(0, 4))
    replay.add(*clips(4, 4))
    assert not replay.lacks(2)
    latents, words = replay.draw(4000, generator)
    assert latents.shape == (4000, 3, 2, 2, 2)
    torch.testing.assert_close(latents[:, 0, 0, 0, 0], words.float())
    counts = words.bincount(minlength=8)
    # 500 each, within 5 standard deviations.
    assert bool(((counts - 500).abs() < 5 * (500 * 7 / 8) ** 0.5).all())


def test_the_oldest_go() -> None:
    replay = Replay()
    replay.add(*clips(0, FULL))
    replay.add(*clips(FULL, 100))
    _, words = replay.draw(20 * FULL, torch.Generator().manual_seed(0))
    assert int(words.min()) >= 100
    assert int(words.max()) >= FULL


def test_clips_of_another_size_replace_all() -> None:
    replay = Replay()
    replay.add(*clips(0, 50))
    replay.add(*clips(100, 5, side=4))
    assert replay.lacks(2)
    _, words = replay.draw(100, torch.Generator().manual_seed(0))
    assert int(words.min()) >= 100

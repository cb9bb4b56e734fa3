"""References: symmetries and ends of events that can be said in one formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewshot_rt.transition import WEIGHTS
from fewshot_rt.world import VOCABULARY, Clips, make_clips
from fewshot_rt.world.clips import PACES
from fewshot_rt.world.events import EVENTS, OFTEN
from fewshot_rt.world.ground import lay_ground
from fewshot_rt.world.render import render
from fewshot_rt.world.scene import (
    FAMILIES,
    GROUNDS,
    LAYERS,
    Dice,
    Scene,
    blend,
    coloured_noise,
    draw_scene,
)
from fewshot_rt.world.shapes import outline

SIZE = 32


def clips(
    batch: int = 8, *, seed: int = 0, size: int = SIZE, frames: int = 2, **options: Any
) -> Clips:
    generator = torch.Generator().manual_seed(seed)
    return make_clips(batch, size=size, frames=frames, generator=generator, **options)


def happening(event: str, *, batch: int = 8, seed: int = 0) -> tuple[Scene, Scene]:
    """A scene before and after an event, with nothing that is fixed to the pixels."""
    dice = Dice(batch, torch.Generator().manual_seed(seed))
    scene = draw_scene(dice)
    scene["noise"] = torch.zeros_like(scene["noise"])
    return EVENTS[event](scene, dice)


def ends(event: str, *, batch: int = 8) -> tuple[Tensor, Tensor]:
    before, after = happening(event, batch=batch)
    return render(before, size=SIZE), render(after, size=SIZE)


def test_the_same_seed_plays_the_same_clips() -> None:
    one, two, other = clips(frames=5), clips(frames=5), clips(frames=5, seed=1)
    torch.testing.assert_close(one.video, two.video, rtol=0, atol=0)
    torch.testing.assert_close(one.words, two.words)
    assert one.video.shape == (8, 3, 5, SIZE, SIZE)
    assert float((one.video - other.video).abs().mean()) > 0.1


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_changes_most_pictures_and_stays_in_range(event: str) -> None:
    played = clips(16, seed=3, events=(event,), pace="linear", frames=3)
    assert {VOCABULARY[word] for word in played.words[:, 0]} == {event}
    assert {VOCABULARY[word] for word in played.words[:, 1]} == {"slowly"}
    video = played.video
    assert bool(video.isfinite().all())
    assert float(video.abs().max()) <= 1
    change = (video[:, :, -1] - video[:, :, 0]).abs().mean(dim=(1, 2, 3))
    assert float((change > 0.01).float().mean()) > 0.5


@pytest.mark.parametrize("event", ["drain", "leave", "focus", "zoom-in", "colour"])
def test_the_first_and_last_frame_do_not_depend_on_the_pace(event: str) -> None:
    expected = clips(events=(event,), pace="repeat_target").video
    for pace in WEIGHTS:
        video = clips(events=(event,), pace=pace, frames=5).video
        torch.testing.assert_close(video[:, :, 0], expected[:, :, 0], rtol=0, atol=0)
        torch.testing.assert_close(video[:, :, -1], expected[:, :, -1], rtol=0, atol=0)


def test_a_drawn_pace_starts_as_a_given_one_does() -> None:
    for seed in range(4):
        drawn = clips(seed=seed, frames=5)
        given = clips(seed=seed, frames=5, pace="repeat_target")
        torch.testing.assert_close(drawn.words[:, 0], given.words[:, 0])
        torch.testing.assert_close(drawn.video[:, :, 0], given.video[:, :, 0], rtol=0, atol=0)


def test_paces_are_those_of_transitions() -> None:
    at_once = clips(events=("move-left",), pace="repeat_target", frames=5)
    assert not at_once.words[:, 1].any()
    video = at_once.video
    assert all(torch.equal(video[:, :, 1], video[:, :, frame]) for frame in (2, 3, 4))
    late = clips(events=("move-left",), pace="discrete", frames=9)
    assert {VOCABULARY[word] for word in late.words[:, 1]} == {"late"}
    video = late.video
    assert all(torch.equal(video[:, :, 0], video[:, :, frame]) for frame in (1, 2, 3))
    assert all(torch.equal(video[:, :, 4], video[:, :, frame]) for frame in (5, 6, 7, 8))


def test_all_events_are_drawn_and_the_telling_ones_more_often() -> None:
    words = clips(320, size=8).words[:, 0]
    counts = dict(zip(VOCABULARY, words.bincount(minlength=len(VOCABULARY)), strict=True))
    for word in ("", *PACES):
        assert counts.pop(word) == 0
    total = sum(OFTEN.get(name, 1) for name in EVENTS)
    for name, count in counts.items():
        expected = len(words) * OFTEN.get(name, 1) / total
        assert abs(float(count) - expected) < 5 * expected**0.5, name


def test_only_the_events_asked_for_are_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    words = make_clips(80, size=8, frames=2, generator=generator, events=("mirror", "fog")).words
    counts = words[:, 0].bincount(minlength=len(VOCABULARY))
    mirror, fog = (int(counts[VOCABULARY.index(name)]) for name in ("mirror", "fog"))
    assert mirror + fog == 80
    expected = 80 * OFTEN["mirror"] / (OFTEN["mirror"] + 1)
    assert abs(mirror - expected) < 5 * (80 - expected) ** 0.5


def test_what_adapters_are_tested_on_is_kept_out() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 1 + len(EVENTS) + len(PACES)
    for word in VOCABULARY:
        assert not any(kept_out in word for kept_out in ("flip", "jigsaw", "keypoint"))
    for event in EVENTS:
        first, last = ends(event, batch=3)
        assert float((first.flip(-2) - last).abs().mean()) > 0.05, event


def test_mirror_mirrors() -> None:
    first, last = ends("mirror")
    torch.testing.assert_close(last, first.flip(-1), rtol=0, atol=1e-5)
    assert float((last - first).abs().mean()) > 0.1


def test_negative_negates() -> None:
    first, last = ends("negative")
    torch.testing.assert_close(last, -first)


def test_drain_leaves_one_value_and_brightness() -> None:
    scene, _ = happening("drain")
    scene |= {"colour": torch.ones(8), "blur": torch.zeros(8), "fog": torch.zeros(8)}
    scene |= {"patch": torch.zeros(8), "hue": torch.zeros(8)}
    # Far from where colours are cut off.
    scene["brightness"] = torch.full((8,), -0.1)
    first, last = (render(scene | {"colour": torch.full((8,), c)}, size=SIZE) for c in (1.0, 0.0))
    torch.testing.assert_close(last[:, 0], last[:, 1])
    is_inside = (first.abs() < 1).all(dim=1)
    torch.testing.assert_close(
        last[:, 0][is_inside], first.mean(dim=1)[is_inside], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("event", "shift"), [("pan-right", (0, -1)), ("pan-down", (-1, 0)), ("pan-left", (0, 1))]
)
def test_pans_move_the_picture(event: str, shift: tuple[int, int]) -> None:
    before, after = happening(event)
    # Four pixels exactly: blur and fog are fixed to the pixels.
    axis = "pan_x" if shift[1] else "pan_y"
    sign = float((after[axis] - before[axis]).sign()[0])
    after[axis] = before[axis] + sign * 4 * 2 / SIZE
    still = {name: torch.zeros(8) for name in ("blur", "fog", "patch", "pixels")}
    # Contrast is about the mean of what is seen.
    still["contrast"] = torch.ones(8)
    first, last = (render(scene | still, size=SIZE) for scene in (before, after))
    rolled = first.roll((4 * shift[0], 4 * shift[1]), dims=(-2, -1))
    inner = (..., slice(4, -4), slice(4, -4))
    close = ((last[inner] - rolled[inner]).abs() < 1e-3).float().mean()
    assert float(close) > 0.99


@pytest.mark.parametrize("event", ["silhouette", "silhouette-kind", "outline"])
def test_silhouettes_are_black_and_white_up_to_soft_edges(event: str) -> None:
    _, last = ends(event)
    torch.testing.assert_close(last[:, 0], last[:, 2], rtol=0, atol=0)
    # Small pictures are mostly edges where the edges are soft.
    _, after = happening(event)
    sharp = render(after | {"soft": torch.full_like(after["soft"], 0.01)}, size=SIZE)
    if event != "outline":
        assert float((sharp.abs() > 0.999).float().mean()) > 0.97
    assert float((last.abs() > 0.999).float().mean()) > 0.6


def test_a_silhouette_is_where_a_black_ground_is_not() -> None:
    scene, black = happening("ground-black")
    sharp = {"soft": torch.full_like(scene["soft"], 0.01), "blur": torch.zeros(8)}
    bare = {name: torch.zeros(8) for name in ("fog", "brightness", "patch", "pixels")}
    bare["contrast"] = torch.ones(8)
    painted = render(black | sharp | bare, size=SIZE)
    shape = render(scene | sharp | {"silhouette": torch.ones(8)}, size=SIZE)
    assert bool((painted[shape == -1] == -1).all())


@pytest.mark.parametrize("kind", range(len(GROUNDS)))
def test_every_ground_is_seen_and_moves_with_the_camera(kind: int) -> None:
    """A ground is fixed to the world: half the zoom shows its middle at half the size."""
    dice = Dice(8, torch.Generator().manual_seed(5))
    scene = draw_scene(dice)
    x, y = torch.meshgrid(torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 9), indexing="xy")
    x, y = x.expand(8, -1, -1), y.expand(8, -1, -1)
    scene["ground_kind"] = torch.full((8,), kind)
    scene["ground_contrast"] = torch.zeros(8)
    colours, nearness = lay_ground(scene, x, y)
    middle, near_middle = lay_ground(scene, x[:, 2:7, 2:7], y[:, 2:7, 2:7])
    torch.testing.assert_close(middle, colours[:, :, 2:7, 2:7])
    torch.testing.assert_close(near_middle, nearness[:, 2:7, 2:7])
    assert bool(((nearness >= 0) & (nearness <= 1)).all())
    is_flat = GROUNDS[kind] == "texture"
    assert (float(colours.std(dim=(2, 3)).mean()) < 1e-3) == is_flat
    assert (float(nearness.max()) > 0.5) == (GROUNDS[kind] in ("landscape", "road"))


@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_every_family_has_an_inside_and_an_outside(family: int) -> None:
    dice = Dice(4, torch.Generator().manual_seed(2))
    scene = draw_scene(dice)
    scene["family"] = torch.full_like(scene["family"], family)
    layer = {n: v[:, 0] for n, v in scene.items() if v.ndim > 1 and v.shape[1] == LAYERS}
    line = torch.linspace(-3, 3, 61)
    v, u = torch.meshgrid(line, line, indexing="ij")
    inside, _ = outline(layer, u.expand(4, -1, -1), v.expand(4, -1, -1))
    share = (inside > 0).float().mean(dim=(1, 2))
    assert bool((share > 0.001).all())
    assert bool((share < 0.3).all())
    assert bool((inside[:, 0] < 0).all())


def test_objects_over_one_another_leave_no_seam() -> None:
    """Two discs that touch cover 1 - (1 - a) (1 - b) of a pixel on their common border."""
    scene = draw_scene(Dice(1, torch.Generator().manual_seed(0)))
    off = torch.zeros_like(scene["visible"])
    scene |= dict.fromkeys(("repeated", "wave", "bumps", "family", "x", "y", "visible"), off)
    scene |= {"stretch": off + 1, "soft": off + 8, "size": off + 0.5, "silhouette": torch.ones(1)}
    one = scene["visible"].index_fill(1, torch.tensor([0]), 1.0)
    both = scene["visible"].index_fill(1, torch.tensor([0, 1]), 1.0)
    seen = {
        n: render(scene | {"visible": v}, size=SIZE) / 2 + 0.5 for n, v in (("1", one), ("2", both))
    }
    torch.testing.assert_close(seen["2"], 1 - (1 - seen["1"]) ** 2)


def test_uncover_shows_what_is_under_a_flat_square() -> None:
    before, after = happening("uncover")
    first, last = render(before, size=SIZE), render(after, size=SIZE)
    line = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    for index in range(8):
        half = before["patch_size"][index]
        is_under = ((line - before["patch_x"][index]).abs() < half)[None, :] & (
            (line - before["patch_y"][index]).abs() < half
        )[:, None]
        assert float(first[index][:, is_under].std()) < 1e-6
        torch.testing.assert_close(first[index][:, ~is_under], last[index][:, ~is_under])


def test_hue_turns_the_channels_and_sketch_finds_steps() -> None:
    scene, after = happening("hue")
    bare = {name: torch.zeros(8) for name in ("blur", "pixels", "fog", "patch")}
    first, last = (render(s | bare, size=SIZE) for s in (scene, after))
    torch.testing.assert_close(last, first.roll(1, dims=1))
    _, sketch = ends("sketch")
    torch.testing.assert_close(sketch[:, 0], sketch[:, 2])


def test_blend_goes_number_by_number() -> None:
    before, after = happening("move-left")
    weight = torch.full((8,), 0.25)
    now = blend(before, after, weight)
    torch.testing.assert_close(now["x"], 0.75 * before["x"] + 0.25 * after["x"])
    assert now["size"] is before["size"]


def test_coloured_noise_has_its_spectrum() -> None:
    dice = Dice(2, torch.Generator().manual_seed(0))
    noise = coloured_noise(dice, channels=3)
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    torch.testing.assert_close(noise.mean(dim=(2, 3)), zero, rtol=0, atol=1e-4)
    torch.testing.assert_close(noise.std(dim=(2, 3)), one, rtol=1e-4, atol=0)
    power = torch.fft.rfft2(noise).abs().square()[:, :, 0].mean(dim=1)
    # Amplitude 1 / f^p: from 2..4 to 16..32 cycles a side, f grows 8 times.
    slope = (power[:, 2:5].mean(dim=1) / power[:, 16:33].mean(dim=1)).log2() / 2 / 3
    assert bool(((slope > 0.4) & (slope < 2.6)).all())

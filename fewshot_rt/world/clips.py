"""Clips: a batch of scenes with one event each, played over a few frames.

Axes: B clips, T frames, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..transition import WEIGHTS, Transition
from .events import EVENTS, OFTEN
from .render import render
from .scene import Dice, Scene, blend, draw_scene

# How an event goes on when it is not over at once: it comes late, or little by little.
PACES = ("late", "slowly")
VOCABULARY = ("", *EVENTS, *PACES)


@dataclass(frozen=True)
class Clips:
    """A batch of clips.

    Shapes: video [B, 3, T, H, W] in [-1, 1]; words [B, 2], into VOCABULARY: the event, and its pace
    (0 where it is over at once).
    """

    video: Tensor
    words: Tensor


def make_clips(
    batch: int,
    *,
    size: int,
    frames: int = 5,
    generator: torch.Generator,
    pace: str | None = None,
    events: Sequence[str] = tuple(EVENTS),
) -> Clips:
    """Play a batch of clips on the generator's device; the same generator state, the same clips.

    pace: how the event goes on over time, as in `Transition`; None draws one for the batch: 3 in 8
        are at once and 2 in 8 late, which also costs less to paint.
    events: of which one is drawn for each clip.
    Raises: ValueError if there is no such event.
    """
    dice = Dice(batch, generator)
    scene = draw_scene(dice)
    drawn = _draw_events(dice, events)
    before, after = _happen(scene, dice, drawn)
    if pace is None:
        paces = ("repeat_target", "repeat_target", "discrete", *WEIGHTS)
        one = Dice(1, generator)
        pace = paces[int(one.integer(len(paces)))]
    weights = Transition(kind=pace, frames=frames).weights()
    shown: dict[float, Tensor] = {}
    for weight in weights:
        if weight not in shown:
            now = blend(before, after, torch.full_like(before["zoom"], weight))
            shown[weight] = render(now, size=size)
    words = torch.stack([drawn, torch.full_like(drawn, _pace_word(pace))], dim=1)
    return Clips(torch.stack([shown[weight] for weight in weights], dim=2), words)


def _pace_word(pace: str) -> int:
    if pace == "repeat_target":
        return 0
    return VOCABULARY.index("late" if pace == "discrete" else "slowly")


def _draw_events(dice: Dice, events: Sequence[str]) -> Tensor:
    device = dice.generator.device
    numbers = torch.tensor([VOCABULARY.index(name) for name in events])
    if len(events) == 1:
        return numbers.to(device).expand(dice.batch)
    share = torch.tensor([float(OFTEN.get(name, 1)) for name in events], device=device)
    drawn = torch.multinomial(share, dice.batch, replacement=True, generator=dice.generator)
    return numbers.to(device)[drawn]


def _happen(scene: Scene, dice: Dice, events: Tensor) -> tuple[Scene, Scene]:
    """Let each clip's event happen: compute those that occur, keep each in its own clips."""
    before, after = dict(scene), dict(scene)
    for word in sorted(set(events.tolist())):
        chosen = events == word
        start, end = EVENTS[VOCABULARY[word]](scene, dice)
        for whole, changed in ((before, start), (after, end)):
            for name, values in changed.items():
                if values is not scene[name]:
                    mask = chosen.reshape((-1,) + (1,) * (values.ndim - 1))
                    whole[name] = torch.where(mask, values, whole[name])
    return before, after

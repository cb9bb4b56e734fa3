"""What can happen in a scene: each event changes the numbers of the scene before or after it.

An event takes the scene and dice, and gives (before, after) and nothing else; it works on the whole
batch, and `make_clips` picks one event a clip.
Kept out on purpose, so that adapters can be tested on them: vertical flip, jigsaw, keypoints.
"""

import math
from collections.abc import Callable

import torch

from .scene import LAYERS, Dice, Scene

Event = Callable[[Scene, Dice], tuple[Scene, Scene]]


def _to(**looks: float) -> Event:
    """Make an event that brings looks to fixed values."""

    def event(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
        ends = {name: torch.full_like(scene[name], value) for name, value in looks.items()}
        return scene, scene | ends

    return event


def _lift(name: str, low: float, high: float, *, falls: bool = False) -> Event:
    """Make an event that starts with a look and loses it; the other way round if it falls."""

    def event(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
        there = scene | {name: dice.uniform(low, high)}
        gone = scene | {name: torch.zeros_like(scene[name])}
        return (gone, there) if falls else (there, gone)

    return event


def _camera(name: str, low: float, high: float) -> Event:
    def event(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
        return scene, scene | {name: scene[name] + dice.uniform(low, high)}

    return event


def _drift(direction: float) -> Event:
    """Make an event in which all objects move one way."""

    def event(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
        step = dice.uniform(0.25, 0.35)[:, None]
        moved = {
            "x": scene["x"] + step * math.cos(direction),
            "y": scene["y"] + step * math.sin(direction),
        }
        return scene, scene | moved

    return event


def _turn(sign: float) -> Event:
    def event(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
        angle = sign * dice.uniform(0.6, 0.9)[:, None]
        return scene, scene | {"angle": scene["angle"] + angle}

    return event


def _grow(factor: float) -> Event:
    def event(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
        return scene, scene | {"size": scene["size"] * factor}

    return event


def _morph(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
    """Everything becomes round."""
    zero = torch.zeros_like(scene["family"])
    return scene, scene | {"family": zero, "wave": zero.float(), "stretch": zero.float() + 1}


def _vanish(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
    return scene, scene | {"visible": torch.zeros_like(scene["visible"])}


def _leave(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
    """The nearest object, put over the middle, goes away and shows what was behind it."""
    last = torch.arange(LAYERS, device=scene["x"].device)[None] == LAYERS - 1
    keep = (~last).float()
    before = scene | {
        "x": scene["x"] * keep + dice.uniform(-0.4, 0.4, 1) * last,
        "y": scene["y"] * keep + dice.uniform(-0.4, 0.4, 1) * last,
        "visible": torch.where(last, 1.0, scene["visible"]),
        "size": torch.where(last, 0.55, scene["size"]),
    }
    return before, before | {"visible": scene["visible"] * keep}


def _of_kind(name: str, value: float) -> Event:
    """Make an event that changes only the objects of the chosen kind."""

    def event(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
        chosen = scene["kind"] == scene["chosen_kind"][:, None]
        return scene, scene | {name: torch.where(chosen, value, scene[name])}

    return event


EVENTS: dict[str, Event] = {
    "move-left": _drift(math.pi),
    "move-right": _drift(0.0),
    "move-up": _drift(-math.pi / 2),
    "move-down": _drift(math.pi / 2),
    "turn-left": _turn(-1.0),
    "turn-right": _turn(1.0),
    "grow": _grow(1.5),
    "shrink": _grow(0.6),
    "round": _morph,
    "vanish": _vanish,
    "leave": _leave,
    "vanish-kind": _of_kind("visible", 0.0),
    "light-kind": _of_kind("light", 1.0),
    "pan-left": _camera("pan_x", -0.45, -0.3),
    "pan-right": _camera("pan_x", 0.3, 0.45),
    "pan-up": _camera("pan_y", -0.45, -0.3),
    "pan-down": _camera("pan_y", 0.3, 0.45),
    "zoom-in": _camera("zoom", 0.45, 0.7),
    "zoom-out": _camera("zoom", -0.7, -0.45),
    "roll-left": _camera("roll", 0.5, 0.8),
    "roll-right": _camera("roll", -0.8, -0.5),
    "mirror": _to(mirror=-1.0),
    "darken": _camera("brightness", -0.8, -0.5),
    "brighten": _camera("brightness", 0.5, 0.8),
    "negative": _to(negative=1.0),
    "denoise": _lift("noise", 0.2, 0.6),
    "noise": _lift("noise", 0.2, 0.6, falls=True),
    "clear": _lift("fog", 0.4, 0.85),
    "fog": _lift("fog", 0.4, 0.85, falls=True),
    "focus": _lift("blur", 0.7, 1.0),
    "defocus": _lift("blur", 0.7, 1.0, falls=True),
    "unpixel": _lift("pixels", 1.0, 1.0),
    "uncover": _lift("patch", 1.0, 1.0),
    "sketch": _to(sketch=1.0),
    "two-tone": _to(two_tone=1.0),
    "ground-black": _to(ground_black=1.0),
    "ground-white": _to(ground_white=1.0),
    "silhouette": _to(silhouette=1.0),
    "silhouette-kind": _to(silhouette_kind=1.0),
    "outline": _to(outline=1.0),
    "depth": _to(depth=1.0),
    "labels": _to(labels=1.0),
}


def _coloured(**looks: float) -> Event:
    """Make an event that needs colours in the scene, and brings looks to fixed values."""

    def event(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
        before = scene | {"colour": torch.ones_like(scene["colour"])}
        return before, before | {n: torch.full_like(scene[n], value) for n, value in looks.items()}

    return event


def _colour_returns(scene: Scene, dice: Dice) -> tuple[Scene, Scene]:
    gray = scene | {"colour": torch.zeros_like(scene["colour"])}
    return gray, scene | {"colour": torch.ones_like(scene["colour"])}


EVENTS |= {"colour": _colour_returns, "drain": _coloured(colour=0.0), "hue": _coloured(hue=1.0)}

# Events that need to know what an object is, or where things go, come more often: they take long to
# learn.
OFTEN = {
    "silhouette": 10,
    "silhouette-kind": 4,
    "outline": 4,
    "sketch": 2,
    "two-tone": 3,
    "uncover": 3,
    "denoise": 3,
    "colour": 3,
    "mirror": 8,
    "zoom-in": 4,
    "zoom-out": 2,
    "roll-left": 2,
    "roll-right": 2,
    "depth": 4,
    "labels": 5,
    "vanish": 2,
    "ground-black": 2,
    "ground-white": 2,
}

"""`fewshot-rt bases`: the models that are known, and what they take."""

from textwrap import fill
from typing import Any

import click

from fewshot_rt.cards import Card, read_cards

from .options import json_option, write_result
from .progress import say

# As wide as a terminal commonly is, with whole names: they are what one types.
ROW = "{:<36} {:>6} {:>8} {:>6} {:>6} {:>7} {:>4}"
WIDTH = 80
NOTES = """
train, predict: GB of GPU memory at this size and number of frames, an estimate.
here: whether the weights are on this machine.
`fewshot-rt check PAIRS --base NAME` tells more.
"""
HEADINGS = ("base", "params", "size", "frames", "train", "predict", "here")


@click.command("bases")
@json_option
def command(as_json: bool) -> None:
    """List the models that are known, and the GPU memory they take.

    Others work, too, if they are of a family that is known: give a folder in diffusers' layout, or
    a name on the Hub. `fewshot-rt check PAIRS --base NAME` reckons for your own pairs, size and
    GPU.
    """
    cards = read_cards()
    say(ROW.format(*HEADINGS))
    for card in cards:
        say(ROW.format(*_row(card)))
    say(NOTES)
    for licence in dict.fromkeys(card.licence for card in cards):
        names = ", ".join(card.name for card in cards if card.licence == licence)
        say(_wrap(f"{licence}: {names}"))
    write_result({"bases": [describe(card) for card in cards]}, as_json=as_json)


def describe(card: Card) -> dict[str, Any]:
    """Give what a card says, as JSON values."""
    height, width = card.native
    facts = ("name", "also", "family", "licence", "sources", "unverified")
    return {
        **{name: getattr(card, name) for name in facts},
        "size": f"{width}x{height}",
        "frames": card.transition.frames,
        "is_here": card.is_here(),
        **card.figures,
    }


def shorten(parameters: int) -> str:
    """Write a number of parameters as people say it: 3.9M, 5.6B."""
    unit, name = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
    return f"{parameters / unit:.1f}{name}"


def _wrap(text: str) -> str:
    return fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _row(card: Card) -> tuple[str, ...]:
    height, width = card.native
    sizes = (card.figures["train_gb"], card.figures["predict_gb"])
    return (
        card.name,
        shorten(card.figures["transformer_parameters"]),
        f"{width}x{height}",
        str(card.transition.frames),
        *(f"{size:.1f}" if size >= 0.1 else "<0.1" for size in sizes),
        "yes" if card.is_here() else "no",
    )

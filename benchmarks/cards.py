"""The figures of the bases' cards; `python -m fewshot_rt.benchmarks.cards` writes them.

Nothing is loaded and no GPU is needed: see `fewshot_rt.costs` and `fewshot_rt.memory`.
"""

import json
import sys
from typing import Any

from fewshot_rt.cards import CARDS, Card, find_card
from fewshot_rt.costs import GB, TERA, Video, count_parameters, measure_pass, open_on_meta
from fewshot_rt.files import write_json
from fewshot_rt.memory import measure_memory


def make_figures(card: Card) -> dict[str, Any]:
    """Compute a card's figures for its native size and frames, and the settings that suit it."""
    suited = open_on_meta(card).suited
    video = Video(frames=card.transition.frames, size=card.native, batch=suited.batch)
    once = measure_pass(card, video)
    memory = measure_memory(card, video, rank=suited.rank, checkpointing=suited.checkpointing)
    parameters = {f"{name}_parameters": n for name, n in count_parameters(card).items()}
    return parameters | {
        "tokens": once.tokens,
        "pass_tflop": float(f"{once.flop / TERA:.4g}"),
        "train_gb": round(memory["train"].total / GB, 2),
        "predict_gb": round(memory["predict"].total / GB, 2),
    }


def write_figures() -> None:
    """Compute the figures of every card and write them into it."""
    for path in sorted(CARDS.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        card = find_card(values["name"])
        assert card is not None
        write_json(path, values | {"figures": make_figures(card)})
        sys.stderr.write(f"{path.stem}\n")


if __name__ == "__main__":
    write_figures()

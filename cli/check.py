"""`fewshot-rt check`: look a folder of pairs over before training."""

from pathlib import Path
from typing import Any

import click

from fewshot_rt.cards import BOX, find_card
from fewshot_rt.train_config import TrainConfig

from .costs import show_costs
from .options import FOLDER, json_option, make_settings, settings_options, write_result
from .progress import say


@click.command("check")
@click.argument("pairs", type=FOLDER)
@click.option(
    "--estimate/--no-estimate",
    default=True,
    help="Tell time and memory: by a few steps, or reckoned for a known --base on the Hub.",
)
@settings_options(TrainConfig)
@json_option
def command(pairs: Path, estimate: bool, config: Path | None, as_json: bool, **flags: Any) -> int:
    """Look a folder of pairs over: orphans, sizes, kinds; estimate time and memory.

    Takes the settings of `train`, so that the estimate is for the training you have in mind.
    """
    from fewshot_rt.augment import Augmentation
    from fewshot_rt.task import Task, lint

    settings = make_settings(TrainConfig, config, flags)
    problems = lint(pairs)
    for problem in problems:
        say(f"{problem.severity}: {problem.message}")
    found: dict[str, Any] = {"problems": [vars(problem) for problem in problems]}
    if any(problem.severity == "error" for problem in problems):
        write_result(found, as_json=as_json)
        return 1
    task = Task.load(pairs)
    card = find_card(settings.base)
    if card is not None:
        task = task.played(card.transition)
    is_known = card is not None or task.states_transition
    kinds = Augmentation.parse(
        settings.augment, codec=task.codec.name, pairs=task.split("train").load_pairs()
    ).kinds
    found |= {
        "train": len(task.split("train").pairs),
        "test": len(task.split("test").pairs),
        "answers": task.codec.name,
        "metrics": task.metrics,
        "transition": task.transition.to_dict() if is_known else None,
        "augmentation": kinds,
    }
    say(f"{found['train']} pairs for training, {found['test']} for testing")
    say(f"answers are of kind {task.codec.name!r}, judged by {', '.join(task.metrics)}")
    if is_known:
        say(f"transition {task.transition.kind}, {task.transition.frames} frames")
    say(f"variants of pairs: {', '.join(kinds) or 'none'}")
    if estimate and card is not None and card.name != BOX:
        found["costs"] = show_costs(card, task, settings)
    elif estimate:
        found["estimate"] = _estimate(task, settings)
    write_result(found, as_json=as_json)
    return 0


def _estimate(task: Any, settings: TrainConfig) -> dict[str, float]:
    from fewshot_rt.fit import estimate

    figures = estimate(task, settings)
    say(
        f"training will take about {figures['seconds']:.0f} s "
        f"and {figures['memory_gb']:.1f} GB here"
    )
    return figures

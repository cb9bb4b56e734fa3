"""Which pairs numbers of denoising steps are tried on, so that a run knows how many it needs."""

from dataclasses import dataclass, replace

import numpy as np

from .errors import ConfigError
from .task import Pair, Task

MOST_TRIED = 8
SHARE = 5  # one pair in so many is held out
FEW = 4  # pairs, below which one is left out of a training of its own


@dataclass(frozen=True)
class Trial:
    """What the adapter learns from, and what numbers of steps are tried on.

    learned: the task with the pairs for training. tried: pairs to try on; none, if steps are to
    stay as the objective has them. apart: where pairs are too few to spare one, the task that
    another adapter is trained on, with one of them left out. is_held_out: the adapter that is
    tried has not seen the pairs.
    """

    learned: Task
    tried: tuple[Pair, ...]
    apart: Task | None = None
    is_held_out: bool = True


def plan_trial(task: Task, chosen: Task, hold_out: int | None) -> Trial:
    """Choose pairs to try on: so many of those chosen for training, or what suits.

    None takes the test pairs of the task, if there are any; else pairs for training that were not
    chosen; else a fifth of the chosen; of two or three, one is left out of a training of its own;
    one alone is tried on itself. 0 holds nothing out, and tries on test pairs alone.
    Raises: ConfigError if no pair would be left to learn from.
    """
    pairs, test = chosen.pairs, task.split("test").pairs
    spare = test or tuple(pair for pair in task.split("train").pairs if pair not in pairs)
    if (test and not hold_out) or (spare and hold_out is None):
        index = np.unique(np.linspace(0, len(spare) - 1, MOST_TRIED).round().astype(int))
        return Trial(chosen, tuple(spare[i] for i in index))
    if hold_out is None and len(pairs) == 1:
        return Trial(chosen, pairs, is_held_out=False)
    if hold_out is None and len(pairs) < FEW:
        return Trial(chosen, pairs[-1:], replace(chosen, pairs=pairs[:-1]))
    count = max(1, len(pairs) // SHARE) if hold_out is None else hold_out
    if count >= len(pairs):
        raise ConfigError(
            f"{count} of {len(pairs)} pairs cannot be held out: at least one is to learn from."
        )
    kept = len(pairs) - count
    return Trial(replace(chosen, pairs=pairs[:kept]), pairs[kept:][:MOST_TRIED])

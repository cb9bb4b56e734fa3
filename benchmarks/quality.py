"""How good answers are: train with several settings on the same pairs, and measure beside
baselines.

python -m fewshot_rt.benchmarks.quality PAIRS --case NAME
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from fewshot_rt.evaluate import evaluate
from fewshot_rt.fit import fit
from fewshot_rt.runs import open_run, read_run
from fewshot_rt.task import Task
from fewshot_rt.train_config import OBJECTIVES, TrainConfig

from .record import RESULTS, Record, append_record
from .report import make_table


def compare_trainings(
    pairs: Path, configs: Mapping[str, TrainConfig], *, case: str, folder: Path
) -> Record:
    """Train a run for each of the settings and measure all on the test pairs.

    The first of the settings is the reference of the record; the baselines stand beside it.
    Raises: DataError, ConfigError, ModelError.
    """
    task = Task.load(pairs)
    available = len(task.split("train").pairs)
    variants: dict[str, dict[str, float]] = {}
    for name, config in configs.items():
        started = time.monotonic()
        for step in fit(pairs, folder / name, config, overwrite=True):
            if step.stage == "train":
                last, seconds = step, time.monotonic() - started
        chosen = task.shots(config.shots or available, config.seed)
        result = evaluate(open_run(folder / name), task, known=chosen.pairs)
        figures = {"steps": float(last.step), "training seconds": seconds}
        variants[name] = result.scores.pop("fewshot-rt") | figures
        baselines = result.scores
    reference = next(iter(configs))
    config, trained = configs[reference], read_run(folder / reference)["train"]
    return Record(
        kind="quality",
        case=case,
        images=result.images,
        reference=reference,
        variants=variants | baselines,
        settings={
            "pairs": config.shots or available,
            "base": config.base,
            "seed": config.seed,
            "rank": trained["rank"],
            "batch": trained["batch"],
        },
    )


@click.command()
@click.argument("pairs", type=click.Path(path_type=Path))
@click.option("--case", required=True, help="Name of the record.")
@click.option("--shots", type=int, help="Pairs for training.  [default: all]")
@click.option("--steps", type=int, help="Updates.  [default: that of train]")
@click.option("--seed", default=42, show_default=True)
@click.option("--objective", multiple=True, default=OBJECTIVES, help="Which to compare.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(
    pairs: Path,
    case: str,
    shots: int | None,
    steps: int | None,
    seed: int,
    objective: tuple[str, ...],
    results: Path,
) -> None:
    """Compare the objectives on a folder of pairs and add a record."""
    base = TrainConfig(shots=shots, seed=seed)
    base = base if steps is None else replace(base, steps=steps)
    configs = {name: replace(base, objective=name) for name in objective}
    with TemporaryDirectory() as folder:
        record = compare_trainings(pairs, configs, case=case, folder=Path(folder))
    click.echo(make_table(record))
    click.echo(str(append_record(record, results)))


if __name__ == "__main__":
    main()

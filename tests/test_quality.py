"""Quality records: what `eval` would say, for several settings, in one table."""

from pathlib import Path
from typing import Any

import numpy as np

from fewshot_rt.benchmarks.quality import compare_trainings
from fewshot_rt.benchmarks.record import append_record, read_records
from fewshot_rt.benchmarks.report import make_table
from fewshot_rt.evaluate import evaluate
from fewshot_rt.images import write_image
from fewshot_rt.runs import open_run
from fewshot_rt.task import Task
from fewshot_rt.train_config import TrainConfig


def test_settings_are_compared_on_the_same_pairs(tiny_base_folder: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    for index in range(4):
        split = "test" if index > 1 else "train"
        mask = np.zeros((32, 32), np.uint8)
        mask[4 + index : 20, 6:22] = 255
        image = np.repeat((mask // 2 + 40)[..., None], 3, axis=-1)
        write_image(pairs / split / "input" / f"{index}.png", image)
        write_image(pairs / split / "target" / f"{index}.png", mask)
    common: dict[str, Any] = {"base": str(tiny_base_folder), "steps": 2, "batch": 2, "variants": 1}
    configs = {
        name: TrainConfig(**common, objective=name, rank=2) for name in ("onestep", "diffusion")
    }
    record = compare_trainings(pairs, configs, case="squares", folder=tmp_path / "runs")
    assert list(record.variants) == [
        "onestep",
        "diffusion",
        "copy",
        "mean target",
        "nearest pair",
        "otsu",
    ]
    again = evaluate(open_run(tmp_path / "runs" / "onestep"), Task.load(pairs), known=())
    assert record.variants["onestep"]["iou"] == again.scores["fewshot-rt"]["iou"]
    assert record.variants["otsu"]["iou"] == 1.0
    assert record.images == 2
    append_record(record, tmp_path / "results")
    (read,) = read_records(tmp_path / "results")
    table = make_table(read)
    assert "| otsu | 1.000 |" in table
    assert "Mean over 2 images; pairs 2" in table

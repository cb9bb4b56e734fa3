"""Alone, nothing changes; two processes step as one with the whole batch would."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fewshot_rt.parallel import agree, average_gradients, join
from fewshot_rt.runs import open_run

SCRIPT = """
import json, sys, torch
from pathlib import Path
from torch import nn
from fewshot_rt.optimise import Optimiser, Pace
from fewshot_rt.parallel import agree, join, leave

rank, count = join("cpu")
layer = nn.Linear(3, 1, bias=False)
nn.init.ones_(layer.weight)
data = torch.arange(12.0).view(4, 3)
own = data[rank * 2 : rank * 2 + 2] if count > 1 else data
spare = nn.Linear(1, 1)  # as an expert that not every batch needs
for parameter in spare.parameters():
    nn.init.ones_(parameter)
named = [*layer.named_parameters(), *spare.named_parameters(prefix="spare")]
optimiser = Optimiser(named, pace=Pace(rate=0.1, warmup=0))
loss = layer(own).square().mean()
if rank == 0:
    loss = loss + spare(data[:2, 1:2]).mean() / (1 if count > 1 else 2)
norm = optimiser.step(loss)
told = agree(float(rank + 5))
Path(sys.argv[1], f"{rank}.json").write_text(
    json.dumps([count, told, norm, [v for _, p in named for v in p.flatten().tolist()]])
)
leave()
tasks = Path("/proc/self/task")
left = [task.joinpath("comm").read_text().strip() for task in tasks.glob("*")]
assert not [name for name in left if "gloo" in name], left
"""


TRAINING = """
import json, sys
from pathlib import Path
import fewshot_rt.fit as module
from fewshot_rt.parallel import own_rank
from fewshot_rt.train_config import TrainConfig

shop, run, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
options = {"batch": 1, "rank": 2, "variants": 2, "warmup": 0, "precision": "fp32"}
config = TrainConfig(base=str(shop / "base"), steps=steps, device="cpu", **options)
take = module.snapshot

def tell(base, provenance):
    adapter = take(base, provenance)
    found = [value for v in adapter.weights.values() for value in v.flatten()[:4].tolist()]
    run.with_suffix(f".{own_rank()}").write_text(json.dumps(found))
    return adapter

module.snapshot = tell
*_, last = (s for s in module.fit(shop / "pairs", run, config) if s.stage == "train")
assert last.step == steps
"""


ACCELERATE = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"


def test_alone_nothing_changes() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    average_gradients([parameter])
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert agree(0.25) == 0.25
    assert join("cpu") == (0, 1)


@pytest.mark.slow
def test_two_processes_train_one_adapter(tmp_path: Path, workshop: Path) -> None:
    """Both end with the same weights, other than one process has; the run is the first one's."""
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    run, one = (tmp_path / "runs" / name for name in ("both", "one"))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    accelerate = ["accelerate.commands.launch", "--multi_gpu", *ACCELERATE.split()]
    for launcher, steps in ((torchrun, "2"), (accelerate, "4")):  # then from the saved state
        subprocess.run([sys.executable, "-m", *launcher, script, workshop, run, steps], check=True)
    subprocess.run([sys.executable, script, workshop, one, "4"], check=True)
    first, second, alone = (
        json.loads(path.read_text())
        for path in (run.with_suffix(".0"), run.with_suffix(".1"), one.with_suffix(".0"))
    )
    assert first == second
    assert first != pytest.approx(alone)
    assert open_run(run).answer(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 3, 32, 32)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_two_processes_step_as_one(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(SCRIPT)
    both, one = tmp_path / "both", tmp_path / "one"
    both.mkdir()
    one.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run([*torchrun, "--nproc-per-node", "2", script, both], check=True)
    subprocess.run([sys.executable, script, one], check=True)
    first, second, alone = (
        json.loads(path.read_text()) for path in (both / "0.json", both / "1.json", one / "0.json")
    )
    assert (first[0], alone[0]) == (2, 1)
    assert first[1] == second[1] == 5.0
    assert first[2:] == second[2:]
    assert first[2] == pytest.approx(alone[2])
    assert first[3] == pytest.approx(alone[3])

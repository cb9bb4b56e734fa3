"""Training runs: they learn, resume as if never stopped, and refuse what does not fit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewshot_rt.adapter import Adapter
from fewshot_rt.bases import open_base
from fewshot_rt.errors import ConfigError, DataError, ModelError
from fewshot_rt.fit import estimate, fit
from fewshot_rt.images import read_image, write_image
from fewshot_rt.runs import latest_run, newest_model, open_run, read_run
from fewshot_rt.task import Task
from fewshot_rt.train import TrainStep
from fewshot_rt.train_config import TrainConfig


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Bright discs on dark noise and their masks: 3 pairs to train, 1 to test, 32x32."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for index in range(4):
        split = "test" if index == 3 else "train"
        down, right = rng.integers(8, 24, 2)
        is_disc = (y - down) ** 2 + (x - right) ** 2 < 40
        image = np.where(is_disc, 200, 60) + rng.integers(0, 20, (32, 32))
        pixels = np.repeat(image[..., None], 3, axis=-1).astype(np.uint8)
        write_image(tmp_path / "pairs" / split / "input" / f"{index}.png", pixels)
        target = is_disc.astype(np.uint8) * 255
        write_image(tmp_path / "pairs" / split / "target" / f"{index}.png", target)
    return tmp_path / "pairs"


@pytest.fixture
def config(tiny_base_folder: Path) -> TrainConfig:
    return TrainConfig(
        base=str(tiny_base_folder), steps=6, batch=2, rank=4, alpha=4, variants=2, device="cpu"
    )


def train_steps(*given: Any) -> list[TrainStep]:
    """What `fit` yields of the training itself; numbers of denoising steps are tried after it."""
    return [step for step in fit(*given) if step.stage == "train"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Adapter.load(folder).weights)


def test_run_folder_is_complete(pairs, config, tmp_path):
    folder = tmp_path / "runs" / "one"
    steps = train_steps(pairs, folder, config)
    assert [step.step for step in steps] == list(range(7))
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "task.json",
        "metrics.jsonl",
        "card.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/provenance.json",
        "pytorch_lora_weights.safetensors",
        "panels/000000.png",
        "panels/000006.png",
        "state/train.pt",
    } <= present
    assert not [name for name in present if ".part-" in name]
    assert latest_run(tmp_path / "runs") == folder
    assert newest_model(folder) == folder
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
    origin = Adapter.load(folder).provenance
    assert (origin.base, origin.shots, origin.steps) == ("tiny", 3, 6)
    assert read_run(folder)["recipe"].codec.name == "mask"


@pytest.mark.parametrize("objective", ["onestep", "diffusion"])
def test_loss_falls(pairs, config, tmp_path, objective):
    config = replace(config, objective=objective, steps=60, rate=0.01, augment="none", batch=4)
    losses = [step.loss for step in train_steps(pairs, tmp_path / "runs" / "one", config)][1:]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_same_seed_same_adapter(pairs, config, tmp_path):
    for name in ("one", "two"):
        list(fit(pairs, tmp_path / "runs" / name, config))
    one, two = (weights(tmp_path / "runs" / name) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    list(fit(pairs, tmp_path / "runs" / "three", replace(config, seed=7)))
    three = weights(tmp_path / "runs" / "three")
    assert not all(torch.equal(one[name], three[name]) for name in one)


def test_left_early_and_resumed_equals_never_stopped(pairs, config, tmp_path):
    whole, parted = tmp_path / "runs" / "whole", tmp_path / "runs" / "parted"
    list(fit(pairs, whole, config))
    steps = fit(pairs, parted, config)
    assert [step.step for step in islice(steps, 4)] == [0, 1, 2, 3]
    steps.close()  # what Ctrl-C does to the loop
    assert not (parted / "adapter").exists()
    resumed = fit(pairs, parted, config)
    log = parted / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "lo')  # a line torn by a kill
    assert next(resumed).step == 3
    list(resumed)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 7))
    one, two = weights(whole), weights(parted)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_killed_training_resumes(pairs, config, tmp_path):
    """A real process, killed without warning, loses at most what came after its last state."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(config).items() if v is not None]
    words = ["train", str(pairs), "--runs", str(tmp_path / "runs"), "--name", "killed", *flags]
    words += ["--steps", "100000", "--save-seconds", "0.05"]
    script = Path(sys.executable).with_name("fewshot-rt")
    process = subprocess.Popen([script, *words], stderr=subprocess.PIPE)
    state = tmp_path / "runs" / "killed" / "state" / "train.pt"
    try:
        deadline = time.monotonic() + 120
        while not state.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        time.sleep(0.5)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    assert state.exists(), errors.decode()
    reached = torch.load(state, weights_only=True)["optimiser"]["steps"]
    settings = replace(config, steps=reached + 2)
    steps = train_steps(pairs, tmp_path / "runs" / "killed", settings)
    assert [step.step for step in steps] == [reached, reached + 1, reached + 2]


def test_resume_with_other_settings_is_refused(pairs, config, tmp_path):
    folder = tmp_path / "runs" / "one"
    list(fit(pairs, folder, config))
    with pytest.raises(ModelError, match="other settings: rank"):
        list(fit(pairs, folder, replace(config, rank=8)))
    target = pairs / "train" / "target" / "0.png"
    write_image(target, 255 - read_image(target)[..., 0])
    with pytest.raises(ModelError, match="the pairs"):
        list(fit(pairs, folder, config))


def test_damaged_state_is_refused(pairs, config, tmp_path):
    folder = tmp_path / "runs" / "one"
    list(fit(pairs, folder, config))
    state = folder / "state" / "train.pt"
    for damage in (b"", b"{}", state.read_bytes()[:-200]):
        state.write_bytes(damage)
        with pytest.raises(ModelError, match="damaged or of other sizes"):
            list(fit(pairs, folder, replace(config, steps=8)))
    list(fit(pairs, folder, config, overwrite=True))


def test_interrupt_within_a_step_waits_for_its_end(pairs, config, tmp_path, monkeypatch):
    """SIGINT between AdamW and the average: the state is that of whole steps."""
    from fewshot_rt.optimise import Optimiser

    whole, parted = tmp_path / "runs" / "whole", tmp_path / "runs" / "parted"
    list(fit(pairs, whole, config))
    follow = Optimiser._follow

    def interrupted(self: Optimiser) -> None:
        if self.step_count == 3:
            os.kill(os.getpid(), signal.SIGINT)
        follow(self)

    monkeypatch.setattr(Optimiser, "_follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(fit(pairs, parted, config))
    monkeypatch.undo()
    steps = fit(pairs, parted, config)
    assert next(steps).step == 3
    list(steps)
    one, two = weights(whole), weights(parted)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_overwrite_removes_runs_and_nothing_else(pairs, config, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "dear.png").write_bytes(b"1")
    with pytest.raises(ModelError, match="is no run"):
        list(fit(pairs, photos, config, overwrite=True))
    assert (photos / "dear.png").exists()
    (pairs / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds the pairs"):
        list(fit(pairs, pairs, config, overwrite=True))
    assert len(Task.load(pairs).pairs) == 4


def test_minutes_end_the_training(pairs, config, tmp_path):
    steps = train_steps(pairs, tmp_path / "one", replace(config, steps=100_000, minutes=0.02))
    assert 1 < len(steps) < 10_000
    assert steps[-1].progress == 1


def test_one_pair_is_enough(pairs, config, tmp_path):
    list(fit(pairs, tmp_path / "one", replace(config, shots=1)))
    assert Adapter.load(tmp_path / "one").provenance.shots == 1
    with pytest.raises(DataError):
        list(fit(pairs, tmp_path / "two", replace(config, shots=4)))


def test_latents_are_encoded_once(pairs, config, tmp_path, monkeypatch):
    import fewshot_rt.latents

    list(fit(pairs, tmp_path / "runs" / "one", config))
    monkeypatch.setattr(
        fewshot_rt.latents, "_encode_batch", lambda *_: pytest.fail("encoded again")
    )
    list(fit(pairs, tmp_path / "runs" / "two", config))
    kept = next((tmp_path / "runs" / ".cache").glob("*.safetensors"))
    monkeypatch.undo()
    good = kept.read_bytes()
    kept.write_bytes(good[:50])
    list(fit(pairs, tmp_path / "runs" / "three", config))
    assert kept.read_bytes() == good


def test_adapter_without_effect_is_refused(pairs, config, tmp_path):
    """A rate this low leaves every weight as it was: the run must not claim to have learned."""
    with pytest.raises(ModelError, match="without effect"):
        list(fit(pairs, tmp_path / "runs" / "one", replace(config, rate=1e-30)))
    assert not (tmp_path / "runs" / "latest").exists()


def test_loss_that_is_no_number_stops_the_training(pairs, config, tmp_path):
    with pytest.raises(ModelError, match="lower --rate"):
        list(fit(pairs, tmp_path / "one", replace(config, rate=1e30, steps=50, warmup=1)))


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"average": 1.0}, {"rank": -1}, {"shots": 0}, {"seed": -1}, {"minutes": 0.0}],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError):
        TrainConfig(**change)


def test_estimate_is_plausible(pairs, config):
    task = Task.load(pairs)
    few, many = (estimate(task, replace(config, steps=steps)) for steps in (10, 10_000))
    assert 0 < few["seconds"] < many["seconds"]
    assert 0.05 < few["memory_gb"] < 24


def test_run_answers_as_its_base_with_the_adapter_attached(pairs, config, tmp_path):
    from fewshot_rt.runs import base_predictor

    folder = tmp_path / "one"
    list(fit(pairs, folder, config))
    predictor = open_run(folder)
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    base = open_base(config.base)
    Adapter.load(folder).attach(base)
    attached = base_predictor(base, predictor.recipe, base.embed(""), origin="attached")
    np.testing.assert_allclose(predictor.answer(image), attached.answer(image), atol=1e-4)


def test_metrics_lines_are_json(pairs, config, tmp_path):
    list(fit(pairs, tmp_path / "one", config))
    lines = [json.loads(x) for x in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in lines)


def test_runs_of_the_first_days_still_answer(pairs, config, tmp_path):
    """They do not say how weights are kept, and hold no prompt."""
    run = tmp_path / "runs" / "one"
    list(fit(pairs, run, config))
    image = np.zeros((1, 3, 32, 32), np.float32)
    expected = open_run(run).answer(image)
    values = json.loads((run / "config.json").read_text())
    for name in ("weights", "checkpointing", "size", "vae"):
        del values["train"][name]
    (run / "config.json").write_text(json.dumps(values))
    task = json.loads((run / "task.json").read_text())
    del task["states_transition"]
    assert len(Task.from_dict(task).pairs) == len(task["pairs"])
    (run / "prompt.safetensors").unlink()
    np.testing.assert_array_equal(open_run(run).answer(image), expected)

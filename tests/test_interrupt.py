"""Ctrl-C in the middle of a command: status 1, one line, and nothing half written."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewshot_rt.images import read_image

SCRIPT = Path(sys.executable).with_name("fewshot-rt")
PAIRS = Path("pairs")
IMAGES = PAIRS / "test" / "input"
FLAGS = ["--base", "base", "--batch", "2", "--variants", "2", "--rank", "4"]


def start(*words: Any) -> "subprocess.Popen[str]":
    """Type a command in a process of its own."""
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    return subprocess.Popen([SCRIPT, *map(str, words)], text=True, **pipes)


def interrupt(process: "subprocess.Popen[str]", *, when: Callable[[], bool]) -> str:
    """Interrupt a command at a moment; give the rest of its stderr."""
    deadline = time.monotonic() + 120
    while not when() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not list(Path().rglob(".part-*.png"))
    return errors


def test_train_saves_its_state_and_resumes(run):
    words = ["train", PAIRS, "--name", "two", *FLAGS]
    metrics = Path("runs/two/metrics.jsonl")
    has_begun = lambda: metrics.exists() and metrics.stat().st_size > 0  # noqa: E731
    interrupt(start(*words, "--steps", 100_000), when=has_begun)
    assert Path("runs/two/state/train.pt").exists()
    assert not Path("runs/latest").exists()
    reached = torch.load("runs/two/state/train.pt", weights_only=True)["optimiser"]["steps"]
    status, out, err = run("train", PAIRS, "--resume", "--steps", reached + 2, "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == reached + 2


def test_export_leaves_nothing_half_done(trained):
    process = start("export")
    # Told as the first of many parts begins, so that much is still to do.
    interrupt(process, when=lambda: "capture" in process.stderr.readline())
    assert not list(Path("runs/one").glob("bundles/*"))
    assert trained("predict", IMAGES)[0] == 0


def test_predict_goes_on_where_it_stopped(exported):
    for index in range(400):
        shutil.copy(IMAGES / "3.png", IMAGES / f"copy-{index}.png")
    answers = Path("answers")
    interrupt(start("predict", IMAGES), when=lambda: len(list(answers.glob("*.png"))) > 5)
    there = list(answers.glob("[!.]*.png"))
    assert 5 < len(there) < 402
    for path in there:
        read_image(path)
    status, out, _ = exported("predict", IMAGES, "--json")
    assert status == 0
    assert json.loads(out)["kept"] == len(there)
    assert json.loads(out)["done"] == 402 - len(there)


def test_pretrain_saves_its_state(run):
    words = ["pretrain", "fresh", "--layers", 1, "--heads", 1, "--native", 32, "--batch", 8]
    words += ["--no-compile", "--minutes", 0.3, "--autoencoder-share", 0.9, "--json"]
    folder = Path("fresh")
    process = start(*words)
    interrupt(process, when=lambda: "autoencoder 1" in process.stderr.readline())
    state = torch.load(folder / "state" / "pretrain.pt", weights_only=True)
    reached = state["autoencoder_steps"]
    assert reached >= 1
    status, out, err = run(*words)
    assert status == 0, err
    assert json.loads(out)["steps"]["autoencoder"] > reached

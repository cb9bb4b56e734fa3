"""Several adapters in one bundle, as a person types it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fewshot_rt.export.bundle import read_manifest
from fewshot_rt.images import read_image

TRAIN = ["--base", "base", "--batch", "2", "--variants", "2", "--rank", "4", "--steps", 3]
ONE, IMAGES = "runs/one/bundles/inductor-fp32", "pairs/test/input"


def test_one_bundle_answers_two_tasks(exported: Any) -> None:
    run = exported
    assert run("export", "one", "--engine", "inductor", "--batch", "3")[0] == 0
    assert run("train", "pairs", "--name", "two", "--seed", 1, "--rate", 0.05, *TRAIN)[0] == 0
    assert read_manifest(Path(ONE))["recipe"]["batch"] == 3
    status, out, _ = run("export", "two", "--into", ONE, "--json")
    assert status == 0
    said = json.loads(out)
    assert said["engine"] == "inductor"
    assert set(said["parity"]) == {"denoiser", "answer"}
    status, out, _ = run(
        "predict", IMAGES, "--model", ONE, "--adapter", "two", "--adapter", "one", "--json"
    )
    assert status == 0
    said = json.loads(out)
    assert (said["done"], said["failed"], said["adapters"]) == (4, 0, ["two", "one"])
    answers = {name: read_all(Path("answers") / name) for name in ("one", "two")}
    assert not np.array_equal(answers["one"], answers["two"])
    # Without a choice it is the first, and the answers lie as they always do.
    assert run("predict", IMAGES, "--model", ONE, "--out", "plain")[0] == 0
    np.testing.assert_array_equal(read_all(Path("plain")), answers["one"])
    assert run("predict", IMAGES, "--model", "runs/two", "--out", "run")[0] == 0
    np.testing.assert_allclose(read_all(Path("run")), answers["two"], atol=1)
    check_refusals(run)


def read_all(folder: Path) -> np.ndarray:
    paths = sorted(folder.glob("*.png"))
    assert len(paths) == 2
    return np.stack([read_image(path) for path in paths]).astype(int)


def check_refusals(run: Any) -> None:
    onnx = "runs/one/bundles/onnx-fp32"
    refused = [
        (2, ("export", "two", "--into", ONE), "has an adapter 'two' already. Give another --name"),
        (2, ("predict", IMAGES, "--model", ONE, "--adapter", "to"), "Did you mean 'two'"),
        (2, ("predict", IMAGES, "--model", "runs/two", "--adapter", "two"), "holds one adapter"),
        (2, ("predict", IMAGES, "--model", ONE, "--hint", "latency"), "takes no hint"),
        (2, ("predict", IMAGES, "--model", "runs/two", "--hint", "latency"), "two is a run"),
        (2, ("export", "two", "--into", ONE, "--out", "elsewhere"), "leave one out"),
        (2, ("export", "two", "--into", ONE, "--batch", "3"), "--batch is for a new one"),
        (1, ("export", "two", "--into", onnx), "Export for 'aoti', 'inductor' or 'trt'"),
        (1, ("export", "two", "--into", "pairs"), "is not a bundle"),
        (1, ("export", "one", "--engine", "aoti", "--precision", "fp8"), "fp8 is for GPUs"),
    ]
    for expected, words, message in refused:
        status, _, shown = run(*words)
        assert status == expected, shown
        assert message in " ".join(shown.split())

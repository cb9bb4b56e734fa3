"""The command line as a person meets it: the whole way, help, JSON, and every kind of mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewshot_rt.cli.main import COMMANDS, main
from fewshot_rt.images import read_image, write_image

SCRIPT = Path(sys.executable).with_name("fewshot-rt")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Bright squares and their masks: 3 pairs to train, 2 to test."""
    for index in range(5):
        split = "test" if index > 2 else "train"
        mask = np.zeros((32, 32), np.uint8)
        mask[4 + index : 20, 6 : 22 + index] = 255
        image = np.repeat((mask // 2 + 40)[..., None], 3, axis=-1)
        write_image(tmp_path / "pairs" / split / "input" / f"{index}.png", image)
        write_image(tmp_path / "pairs" / split / "target" / f"{index}.png", mask)
    return tmp_path / "pairs"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Any:
    """Type a command in an empty folder; give its status, its stdout and its stderr."""
    monkeypatch.chdir(tmp_path)

    def typed(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewshot-rt", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return typed


@pytest.fixture
def trained(run: Any, pairs: Path, tiny_base_folder: Path) -> Any:
    """The same, after a short training named "one"."""
    flags = ["--base", tiny_base_folder, "--steps", 3, "--batch", 2, "--variants", 2, "--rank", 4]
    status, _, err = run("train", pairs, "--name", "one", *flags)
    assert status == 0, err
    return run


def test_the_whole_way(trained, pairs, tmp_path):
    """As the README has it: `train`, then `export --engine onnx` and `predict DIR` alone."""
    assert trained("export", "--engine", "onnx")[0] == 0
    status, out, _ = trained("predict", pairs / "test" / "input", "--json")
    assert status == 0
    result = json.loads(out)
    assert Path(result["model"]).name == "onnx-fp32"
    assert (result["done"], result["failed"]) == (2, 0)
    for name in ("3.png", "4.png"):
        answer = read_image(tmp_path / "answers" / name)
        assert answer.shape == (32, 32, 3)
        assert set(np.unique(answer)) <= {0, 255}
    status, out, err = trained("eval", pairs, "--panel", "panel.png", "--json")
    assert status == 0
    scores = json.loads(out)["scores"]
    assert set(scores) == {"fewshot-rt", "copy", "mean target", "nearest pair", "otsu"}
    assert scores["otsu"]["iou"] == 1.0  # bright squares on dark: exactly what Otsu's method finds
    assert "otsu" in err
    assert read_image(tmp_path / "panel.png").shape[1] > 3 * 32


def test_bundle_and_run_give_the_same_answers(trained, pairs):
    trained("export", "--engine", "onnx")
    source = pairs / "test" / "input"
    trained("predict", source, "--out", "a", "--model", "runs/one/bundles/onnx-fp32")
    trained("predict", source, "--out", "b", "--model", "one")
    trained("export", "--engine", "eager")
    trained("predict", source, "--out", "c", "--model", "one/bundles/eager-fp32")
    for name in ("3.png", "4.png"):
        one, other, third = (read_image(Path(place) / name) for place in "abc")
        assert (one != other).mean() < 0.01
        assert (other != third).mean() < 0.01


def test_newer_training_comes_before_an_older_bundle(trained, pairs, tiny_base_folder):
    trained("export", "--engine", "onnx")
    flags = ["--base", tiny_base_folder, "--steps", 4, "--batch", 2, "--variants", 2, "--rank", 4]
    assert trained("train", pairs, "--name", "one", "--resume", *flags)[0] == 0
    _, out, _ = trained("predict", pairs / "test" / "input", "--json")
    assert Path(json.loads(out)["model"]).name == "one"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_well(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert out.startswith(f"Usage: fewshot-rt {command}")
    assert "--json" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_help_of_all_is_quick_and_names_every_command():
    done = subprocess.run(
        [SCRIPT, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train"], "PAIRS"),
        (["train", "x", "--step", "3"], "--steps"),
        (["train", "x", "--objective", "twostep"], "onestep"),
        (["train", "x", "--steps", "many"], "integer"),
        (["train", "pairs", "--steps", "0"], "at least 1"),
        (["train", "pairs", "--name", "../out"], "one plain name"),
        (["train", "pairs", "--config", "no.toml"], "cannot be read"),
        (["train", "pairs", "--augment", "flip"], "Did you mean 'flips'"),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_possible(run, pairs, words, hint):
    status, out, err = run(*words)
    assert status == 2
    assert hint in err
    assert out == ""


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["predict", "pairs"], "no trained run"),
        (["export"], "no trained run"),
        (["eval", "pairs"], "no trained run"),
        (["predict", "nowhere"], "does not exist"),
        (["train", "nowhere"], "does not exist"),
        (["train", "pairs", "--base", "pockett"], "Did you mean 'pocket'"),
    ],
)
def test_our_errors_are_1_in_one_line_and_in_json(run, pairs, words, hint):
    status, out, err = run(*words, "--json")
    assert status == 1
    assert hint in err
    assert hint in json.loads(out)["error"]
    assert "Traceback" not in err


def test_config_file_speaks_and_flags_come_first(run, pairs, tiny_base_folder, tmp_path):
    text = f'base = "{tiny_base_folder}"\nsteps = 2\nbatch = 2\nvariants = 1\nrank = 2\n'
    (tmp_path / "settings.toml").write_text(text)
    words = ["train", pairs, "--config", "settings.toml", "--name", "one", "--steps", 3]
    status, out, err = run(*words, "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == 3
    assert json.loads((tmp_path / "runs/one/config.json").read_text())["train"]["rank"] == 2
    (tmp_path / "settings.toml").write_text("stepps = 2\n")
    status, _, err = run(*words)
    assert status == 2
    assert "Did you mean 'steps'" in err


def test_a_run_is_not_replaced_unasked(trained, pairs, tiny_base_folder):
    flags = ["--base", tiny_base_folder, "--steps", 3, "--batch", 2, "--variants", 2, "--rank", 4]
    before = Path("runs/one/adapter/adapter_model.safetensors").read_bytes()
    status, _, err = trained("train", pairs, "--name", "one", *flags)
    assert status == 1
    assert "--resume" in err
    assert "--overwrite" in err
    assert Path("runs/one/adapter/adapter_model.safetensors").read_bytes() == before
    status, _, _ = trained("train", pairs, "--name", "one", "--overwrite", *flags, "--seed", 5)
    assert status == 0
    assert Path("runs/one/adapter/adapter_model.safetensors").read_bytes() != before


def test_failed_images_are_1_and_the_rest_is_done(trained, pairs):
    source = pairs / "test" / "input"
    (source / "cut.png").write_bytes((source / "3.png").read_bytes()[:40])
    status, out, err = trained("predict", source, "--json")
    assert status == 1
    result = json.loads(out)
    assert (result["done"], result["failed"]) == (2, 1)
    assert "cut.png" in err
    status, out, _ = trained("predict", source, "--json")
    assert (status, json.loads(out)["kept"]) == (1, 2)


@pytest.mark.parametrize("damage", ["adapter", "bundle", "config"])
def test_damaged_models_are_refused(trained, pairs, damage):
    trained("export", "--engine", "onnx")
    bundle = Path("runs/one/bundles/onnx-fp32")
    if damage == "bundle":
        file = next(bundle.glob("denoiser*"))
        file.write_bytes(file.read_bytes()[:-100])
    else:
        shutil.rmtree(bundle)
        name = "config.json" if damage == "config" else "adapter/adapter_model.safetensors"
        Path("runs/one", name).write_bytes(b"{")
    status, _, err = trained("predict", pairs / "test" / "input")
    assert status == 1
    assert "damaged" in err or "differs" in err or "again" in err
    assert not Path("answers").exists()


def test_adapter_for_another_base_is_refused(trained, pairs, tiny_base_folder):
    index = tiny_base_folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"revision": "newer"}))
    status, _, err = trained("predict", pairs / "test" / "input")
    assert status == 1
    assert "made for base 'tiny' revision 0" in err


def test_unknown_engine_is_refused_with_the_nearest(trained):
    status, _, err = trained("export", "--engine", "onyx")
    assert status == 2
    assert "Did you mean 'onnx'" in err
    assert not Path("runs/one/bundles").exists()


class TestCheck:
    """`check` names what is wrong before any time is spent."""

    def test_good_pairs(self, run, pairs, tiny_base_folder):
        words = ["check", pairs, "--base", tiny_base_folder, "--batch", 2, "--variants", 1]
        status, out, err = run(*words, "--json")
        assert status == 0, err
        found = json.loads(out)
        assert (found["train"], found["test"], found["answers"]) == (3, 2, "mask")
        assert found["estimate"]["seconds"] > 0
        assert "about" in err

    def test_orphans_and_sizes_are_named(self, run, pairs):
        (pairs / "train" / "target" / "0.png").unlink()
        write_image(pairs / "train" / "input" / "1.png", np.zeros((8, 9, 3), np.uint8))
        status, out, err = run("check", pairs, "--json")
        assert status == 1
        assert "0" in err
        assert "9x8" in err
        assert "32x32" in err
        assert len([p for p in json.loads(out)["problems"] if p["severity"] == "error"]) == 2
        status, _, err = run("train", pairs)
        assert status == 1
        assert "9x8" in err
        assert not Path("runs").exists()

    def test_one_pair_is_a_warning(self, run, pairs):
        for index in (1, 2):
            for side in ("input", "target"):
                (pairs / "train" / side / f"{index}.png").unlink()
        status, _, err = run("check", pairs, "--no-estimate")
        assert status == 0
        assert "warning" in err

    def test_empty_folder(self, run, tmp_path):
        (tmp_path / "empty").mkdir()
        status, _, err = run("check", "empty")
        assert status == 1
        assert "input/" in err


def test_doctor_tells_what_can_run(run):
    status, out, err = run("doctor", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["engines"]["onnx"] is None
    assert found["versions"]["torch"].startswith("2.")
    assert "engine onnx: ready" in err


def test_pretrain_makes_a_base_and_goes_on(run, tmp_path):
    words = ["pretrain", "base", "--layers", 1, "--heads", 1, "--native", 32, "--batch", 8]
    words += ["--no-compile", "--json"]
    status, out, err = run(*words, "--minutes", 0.05)
    assert status == 0, err
    first = json.loads(out)["steps"]
    assert all(count > 0 for count in first.values())
    status, out, _ = run(*words, "--minutes", 0.1)
    assert status == 0
    assert json.loads(out)["steps"]["denoiser"] > first["denoiser"]
    assert (tmp_path / "base" / "README.md").is_file()
    status, _, err = run(*words, "--heads", 2, "--minutes", 0.1)
    assert status == 1
    assert "other sizes" in err


def test_world_preview_is_a_moving_picture(run, tmp_path):
    from PIL import Image

    assert run("pretrain", "none", "--preview", "world.gif")[0] == 0
    with Image.open(tmp_path / "world.gif") as picture:
        assert picture.n_frames > 4
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_bundle_answers_cold_without_the_training_packages(trained, pairs):
    """A new process predicts with a bundle and imports none of what trained it."""
    trained("export", "--engine", "onnx")
    probe = (
        "import sys; from fewshot_rt.cli.main import commands; "
        f"status = commands.main(['predict', {str(pairs / 'test' / 'input')!r}], "
        "standalone_mode=False); "
        "heavy = {'torch', 'diffusers', 'peft', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=60, env=environment)
    assert len(list(Path("answers").glob("*.png"))) == 2

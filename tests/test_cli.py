"""The command line as a person meets it: the whole way, help, JSON, and every kind of mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewshot_rt.bases.pocket import WEIGHTS, open_base
from fewshot_rt.cli.main import COMMANDS
from fewshot_rt.images import read_image, write_image
from fewshot_rt.world import EVENTS

SCRIPT = Path(sys.executable).with_name("fewshot-rt")
PAIRS = Path("pairs")
IMAGES = PAIRS / "test" / "input"
FLAGS = ["--base", "base", "--batch", "2", "--variants", "2", "--rank", "4"]


def test_the_whole_way(exported, tmp_path):
    """As the README has it: `train`, then `export --engine onnx` and `predict DIR` alone."""
    status, out, _ = exported("predict", IMAGES, "--json")
    assert status == 0
    result = json.loads(out)
    assert Path(result["model"]).name == "onnx-fp32"
    assert (result["done"], result["failed"]) == (2, 0)
    for name in ("3.png", "4.png"):
        answer = read_image(tmp_path / "answers" / name)
        assert answer.shape == (32, 32, 3)
        assert set(np.unique(answer)) <= {0, 255}
    status, out, err = exported("eval", PAIRS, "--panel", "panel.png", "--json")
    assert status == 0
    scores = json.loads(out)["scores"]
    assert set(scores) == {"fewshot-rt", "copy", "mean target", "nearest pair", "otsu"}
    assert scores["otsu"]["iou"] == 1.0  # bright squares on dark: exactly what Otsu's method finds
    assert "otsu" in err
    assert read_image(tmp_path / "panel.png").shape[1] > 3 * 32


def test_bundle_and_run_give_the_same_answers(exported):
    shutil.copytree("runs/one", "runs/bare", ignore=shutil.ignore_patterns("bundles"))
    exported("predict", IMAGES, "--out", "a", "--model", "runs/one/bundles/onnx-fp32")
    exported("predict", IMAGES, "--out", "b", "--model", "bare")
    exported("export", "--engine", "eager")
    exported("predict", IMAGES, "--out", "c", "--model", "one/bundles/eager-fp32")
    for name in ("3.png", "4.png"):
        one, other, third = (read_image(Path(place) / name) for place in "abc")
        assert (one != other).mean() < 0.01
        assert (other != third).mean() < 0.01


def test_tiles_keep_the_size_and_change_nothing_in_one_window(exported):
    write_image(Path("large/wide.png"), np.zeros((50, 90, 3), np.uint8))
    status, out, err = exported("predict", "large", "--tile", "--overlap", 0.5, "--json")
    assert status == 0, err
    assert json.loads(out)["tiling"] == {"overlap": 0.5}
    assert read_image(Path("answers/wide.png")).shape == (50, 90, 3)
    exported("predict", IMAGES, "--out", "whole")
    _, out, _ = exported("predict", IMAGES, "--out", "tiled", "--tile", "--json")
    assert json.loads(out)["tiling"] == {"overlap": 0.25}
    for name in ("3.png", "4.png"):
        assert Path("whole", name).read_bytes() == Path("tiled", name).read_bytes()


def test_newer_training_comes_before_an_older_bundle(exported):
    assert exported("train", PAIRS, "--resume", "--steps", 4)[0] == 0
    _, out, _ = exported("predict", IMAGES, "--json")
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
        (["train", "pairs", "--device", "banana"], "cpu, cuda"),
        (["pretrain", "x", "--device", "tpu"], "cpu, cuda"),
        (["pretrain", "x", "--zero-noise", "0.7", "--pure-noise", "0.4"], "1 at most"),
        (["pretrain", "x", "--events", "mirror,flop"], "unknown event 'flop'"),
        (["pretrain", "x", "--init", "pocket", "--autoencoder", "pocket"], "only one"),
        (["bench", "taks"], "Did you mean 'tasks'"),
        (["bench", "tasks", "--tasks", "coins"], "coin-masks"),
        (["bench", "tasks", "--shots", "1,x"], "1,3,10"),
        (["bench", "tasks", "--shots", "0"], "below 1"),
        (["bench", "tasks", "--methods", "unet"], "u-net"),
        (["train", "pairs", "--augment", "flip"], "Did you mean 'flips'"),
        (["predict", "pairs", "--overlap", "0.5"], "give --tile"),
        (["predict", "pairs", "--tile", "--overlap", "32"], "Give 0 to 0.75"),
        (["predict", "pairs", "--tile", "--overlap", "-0.1"], "Give 0 to 0.75"),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_possible(run, words, hint):
    status, out, err = run(*words)
    assert status == 2
    assert hint in err
    assert out == ""
    status, out, _ = run(*words, "--json")
    assert status == 2
    assert hint in json.loads(out)["error"]


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
def test_our_errors_are_1_in_one_line_and_in_json(run, words, hint):
    status, out, err = run(*words, "--json")
    assert status == 1
    assert hint in err
    assert hint in json.loads(out)["error"]
    assert "Traceback" not in err


def test_config_file_speaks_and_flags_come_first(run, tmp_path):
    text = 'base = "base"\nsteps = 2\nbatch = 2\nvariants = 1\nrank = 2\n'
    (tmp_path / "settings.toml").write_text(text)
    words = ["train", PAIRS, "--config", "settings.toml", "--name", "one", "--steps", 3]
    status, out, err = run(*words, "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == 3
    assert json.loads((tmp_path / "runs/one/config.json").read_text())["train"]["rank"] == 2
    (tmp_path / "settings.toml").write_text("stepps = 2\n")
    status, _, err = run(*words)
    assert status == 2
    assert "Did you mean 'steps'" in err


def test_a_run_is_not_replaced_unasked(trained):
    flags = ["--steps", 3, *FLAGS]
    before = Path("runs/one/adapter/adapter_model.safetensors").read_bytes()
    status, _, err = trained("train", PAIRS, "--name", "one", *flags)
    assert status == 1
    assert "--resume" in err
    assert "--overwrite" in err
    assert Path("runs/one/adapter/adapter_model.safetensors").read_bytes() == before
    (PAIRS / "train" / "target" / "0.png").rename("aside.png")
    assert trained("train", PAIRS, "--name", "one", "--overwrite", *flags)[0] == 1
    assert Path("runs/one/adapter/adapter_model.safetensors").read_bytes() == before
    Path("aside.png").rename(PAIRS / "train" / "target" / "0.png")
    status, _, _ = trained("train", PAIRS, "--name", "one", "--overwrite", *flags, "--seed", 5)
    assert status == 0
    assert Path("runs/one/adapter/adapter_model.safetensors").read_bytes() != before


def test_failed_images_are_1_and_the_rest_is_done(exported):
    (IMAGES / "cut.png").write_bytes((IMAGES / "3.png").read_bytes()[:40])
    status, out, err = exported("predict", IMAGES, "--json")
    assert status == 1
    result = json.loads(out)
    assert (result["done"], result["failed"]) == (2, 1)
    assert "cut.png" in err
    status, out, _ = exported("predict", IMAGES, "--json")
    assert (status, json.loads(out)["kept"]) == (1, 2)


@pytest.mark.parametrize("damage", ["adapter", "bundle", "config"])
def test_damaged_models_are_refused(exported, damage):
    bundle = Path("runs/one/bundles/onnx-fp32")
    if damage == "bundle":
        file = next(bundle.glob("denoiser*"))
        file.write_bytes(file.read_bytes()[:-100])
    else:
        shutil.rmtree(bundle)
        name = "config.json" if damage == "config" else "adapter/adapter_model.safetensors"
        Path("runs/one", name).write_bytes(b"{")
    status, _, err = exported("predict", IMAGES)
    assert status == 1
    assert "damaged" in err or "differs" in err or "again" in err
    assert not Path("answers").exists()


def test_adapter_for_another_base_is_refused(trained):
    config = Path("runs/one/config.json")
    values = json.loads(config.read_text())
    values["train"]["base"] = "base"  # this folder's own copy
    config.write_text(json.dumps(values))
    index = Path("base/model_index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"revision": "newer"}))
    status, _, err = trained("predict", IMAGES)
    assert status == 1
    assert "made for base 'tiny' revision 0" in err


def test_unknown_engine_is_refused_with_the_nearest(trained):
    status, _, err = trained("export", "--engine", "onyx")
    assert status == 2
    assert "Did you mean 'onnx'" in err
    assert not Path("runs/one/bundles").exists()


class TestCheck:
    """`check` names what is wrong before any time is spent."""

    def test_good_pairs(self, run):
        status, out, err = run("check", PAIRS, *FLAGS, "--json")
        assert status == 0, err
        found = json.loads(out)
        assert (found["train"], found["test"], found["answers"]) == (3, 2, "mask")
        assert found["estimate"]["seconds"] > 0
        assert "about" in err

    def test_orphans_and_sizes_are_named(self, run):
        (PAIRS / "train" / "target" / "0.png").unlink()
        write_image(PAIRS / "train" / "input" / "1.png", np.zeros((8, 9, 3), np.uint8))
        status, out, err = run("check", PAIRS, "--json")
        assert status == 1
        assert "0" in err
        assert "9x8" in err
        assert "32x32" in err
        assert len([p for p in json.loads(out)["problems"] if p["severity"] == "error"]) == 2
        status, _, err = run("train", PAIRS)
        assert status == 1
        assert "9x8" in err
        assert not Path("runs").exists()

    def test_one_pair_is_a_warning(self, run):
        for index in (1, 2):
            for side in ("input", "target"):
                (PAIRS / "train" / side / f"{index}.png").unlink()
        status, _, err = run("check", PAIRS, "--no-estimate")
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
    assert found["able"]["onnx"]["devices"][0] == "cpu"
    assert "int8" in found["able"]["openvino"]["precisions"]
    assert found["fastest"] in found["able"]
    assert f"fastest on this processor: {found['fastest']}" in err


def test_pretrain_makes_a_base_and_goes_on(run, tmp_path):
    words = ["pretrain", "base", "--layers", 1, "--heads", 1, "--native", 32, "--batch", 8]
    words += ["--no-compile", "--json"]
    status, out, err = run(*words, "--minutes", 0.05)
    assert status == 0, err
    first = json.loads(out)["steps"]
    assert all(count > 0 for count in first.values())
    vae = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    frozen = vae.read_bytes()
    status, out, _ = run(*words, "--minutes", 0.1)
    assert status == 0
    assert vae.read_bytes() == frozen
    assert json.loads(out)["steps"]["denoiser"] > first["denoiser"]
    assert (tmp_path / "base" / "README.md").is_file()
    status, _, err = run(*words, "--heads", 2, "--minutes", 0.1)
    assert status == 1
    assert "other sizes" in err


def test_pretrain_takes_the_autoencoder_of_another_base(run, workshop):
    words = ["pretrain", "taken", "--layers", 1, "--heads", 1, "--native", 32, "--batch", 8]
    words += ["--no-compile", "--json", "--minutes", 0.03]
    status, _, err = run(*words, "--autoencoder", "nowhere")
    assert status == 1
    assert "nowhere" in err
    # The tiny base has 8 latent channels, and pocket's transformer is made for 12.
    status, _, err = run(*words, "--autoencoder", "base")
    assert status == 1
    assert "12 channels" in err
    status, out, err = run(*words, "--autoencoder", "pocket")
    assert status == 0, err
    assert json.loads(out)["steps"]["autoencoder"] == 0
    own, taken = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        for folder in (WEIGHTS, Path("taken"))
    )
    assert all(torch.equal(own[name], taken[name]) for name in own)


def test_pretrain_begins_with_the_weights_of_another_base(run, tmp_path):
    """With a rate of almost zero, what comes out is what went in, and words that it lacks."""
    words = ["pretrain", "more", "--init", "pocket", "--native", 32, "--batch", 8]
    words += ["--no-compile", "--json", "--minutes", 0.03, "--rate", 1e-12]
    status, _, err = run(*words, "--heads", 2)
    assert status == 1
    assert "other sizes" in err
    status, out, err = run(*words)
    assert status == 0, err
    assert json.loads(out)["steps"]["denoiser"] > 0
    before, after = open_base("pocket"), open_base("more")
    own = after.denoiser().transformer.state_dict()
    for name, value in before.denoiser().transformer.state_dict().items():
        taken = own[name][:, : value.shape[1]] if name == "patch_embedding.weight" else own[name]
        torch.testing.assert_close(taken, value, rtol=2e-3, atol=1e-4)
    event = after.embed("silhouette")["prompt"]
    torch.testing.assert_close(event, before.embed("silhouette")["prompt"], rtol=2e-3, atol=1e-4)
    first, *earlier = after.index["initialised_from"]
    assert first.startswith(f"pocket, revision {before.revision}: ")
    assert earlier == before.index["initialised_from"]
    assert "init" not in after.index["settings"]
    assert before.revision in (tmp_path / "more" / "README.md").read_text()


def test_bench_base_measures_every_event(run):
    status, out, err = run(
        "bench", "base", "pocket", "--clips", 2, "--size", 32, "--results", "results", "--json"
    )
    assert status == 0, err
    tables = json.loads(out)["tables"]
    assert "photographs" in tables["pocket-autoencoder"]
    assert all(event in tables["pocket-events"] for event in EVENTS)
    assert len(list(Path("results").glob("*.jsonl"))) == 1


def test_bench_tasks_goes_on_and_draws_its_tables(run, workshop):
    words = ["bench", "tasks", "--tasks", "coin-masks,denoising", "--shots", "1,2", "--seeds", 0]
    words += ["--base", "base", "--size", 32, "--steps", 2, "--unet-steps", 2, "--test", 2]
    status, out, err = run(*words, "--results", "results", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["cells"] == 4
    assert "| pocket |" in result["mean"]
    assert "| denoising | psnr |" in result["tables"]["2"]
    assert Path("results/tasks.png").is_file()
    (records,) = Path("results").glob("*.jsonl")
    written = records.read_text()
    assert len(written.splitlines()) == 4
    status, out, _ = run(*words, "--results", "results", "--json")
    assert json.loads(out) == result
    assert records.read_text() == written


def test_world_preview_is_a_moving_picture(run, tmp_path):
    from PIL import Image

    assert run("pretrain", "--preview", "world.gif")[0] == 0
    with Image.open(tmp_path / "world.gif") as picture:
        assert picture.n_frames > 4
    assert run("pretrain")[0] == 2


@pytest.mark.slow
def test_bundle_answers_cold_without_the_training_packages(exported):
    """A new process predicts with a bundle and imports none of what trained it."""
    probe = (
        "import sys; from fewshot_rt.cli.main import commands; "
        f"status = commands.main(['predict', {str(IMAGES)!r}], "
        "standalone_mode=False); "
        "heavy = {'torch', 'diffusers', 'peft', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=60, env=environment)
    assert len(list(Path("answers").glob("*.png"))) == 2

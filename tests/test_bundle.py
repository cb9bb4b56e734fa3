"""References: the eager predictor, and `decode` of all frames for the last one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny.bundles import RECIPE, eager_predictor, pictures

from fewshot_rt.errors import ConfigError, DataError, EngineError, ModelError
from fewshot_rt.export import bundle as bundle_module
from fewshot_rt.export.build import BuildStep, export_bundle
from fewshot_rt.export.bundle import open_bundle, read_manifest, staged_bundle
from fewshot_rt.export.engines import eager as eager_engine
from fewshot_rt.export.parity import compare, require
from fewshot_rt.predictor import Predictor, Recipe
from fewshot_rt.spec import ROLES

SINGLE = replace(RECIPE, batch=1, steps=1, noise="zero")


def export(base: Any, folder: Path, *, engine: str, recipe: Recipe = RECIPE) -> list[BuildStep]:
    steps = export_bundle(
        base,
        recipe=recipe,
        prompt=base.embed("mask"),
        engine=engine,
        precision="fp32",
        folder=folder,
        origin={"licence": "Apache-2.0"},
    )
    return list(steps)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.name.startswith("."))


@pytest.fixture(scope="module")
def sound_bundle(
    make_tiny_base: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An eager bundle: quick to make, and the same folder but for the files of the roles."""
    folder = tmp_path_factory.mktemp("sound") / "eager-fp32"
    export(make_tiny_base(), folder, engine="eager", recipe=SINGLE)
    return folder


@pytest.fixture
def eager_bundle(sound_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the eager bundle, to do harm to."""
    return Path(shutil.copytree(sound_bundle, tmp_path / "bundles" / "eager-fp32"))


def test_an_onnx_bundle_answers_as_eager_does(tiny_base: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bundles" / "onnx-fp32"
    steps = export(tiny_base, folder, engine="onnx")
    done = [(step.role, step.stage) for step in steps]
    stages = ("capture", "build", "load", "parity")
    assert done[:-2] == [(role, stage) for role in ROLES for stage in stages]
    assert done[-2:] == [("answer", "parity"), ("answer", "write")]
    predictor, reference = open_bundle(folder, threads=1), eager_predictor(tiny_base)
    for count in (1, 2, 3):
        expected, given = (p.answer(pictures(count)) for p in (reference, predictor))
        require(compare({"image": expected}, {"image": given}), role="all", tolerance="fp32")
    with pytest.raises(ConfigError, match="'onnx', which takes no hint 'throughput'"):
        open_bundle(folder, hint="throughput")
    check_full_decode(tiny_base, predictor)
    check_manifest(folder)
    check_light_process(folder, predictor.answer(pictures(2)))


def check_full_decode(base: Any, predictor: Predictor) -> None:
    latents = np.random.default_rng(4).normal(size=(3, 8, 2, 8, 8)).astype(np.float32)
    with torch.no_grad():
        video = base.autoencoder.decode(torch.from_numpy(latents))
    last = predictor.runners["decoder"]({"latents": latents})
    require(compare({"image": video[:, :, -1]}, last), role="decoder", tolerance="fp32")


def check_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert Recipe.from_dict(manifest["recipe"]) == RECIPE
    assert manifest["origin"] == {"base": "tiny", "revision": "0", "licence": "Apache-2.0"}
    assert set(manifest["parity"]) == {*ROLES, "answer"}
    assert 0 < manifest["parity"]["denoiser"]["prediction"]["rel_l2"] <= 1e-5
    assert set(manifest["files"]) | {"manifest.json"} == {p.name for p in folder.iterdir()}
    assert str(folder) not in json.dumps(manifest)


def check_light_process(folder: Path, expected: np.ndarray) -> None:
    """Predict in a new process that must not import what a bundle does without."""
    program = f"""
import sys
from pathlib import Path
import numpy as np
from fewshot_rt.export.bundle import open_bundle
images = np.random.default_rng(9).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
answer = open_bundle(Path({str(folder)!r}), threads=1).answer(images)
np.save({str(folder.parent / "answer.npy")!r}, answer)
heavy = {{"torch", "diffusers", "peft", "transformers", "onnx", "onnxscript"}} & set(sys.modules)
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    np.testing.assert_array_equal(np.load(folder.parent / "answer.npy"), expected)


def test_an_eager_bundle_of_batches_of_one_is_exact(tiny_base: Any, sound_bundle: Path) -> None:
    parity = read_manifest(sound_bundle)["parity"]
    assert [p["rel_l2"] for role in parity.values() for p in role.values()] == [0.0] * 4
    expected = eager_predictor(tiny_base, SINGLE).answer(pictures(1))
    np.testing.assert_array_equal(open_bundle(sound_bundle).answer(pictures(1)), expected)


@pytest.mark.parametrize("name", ["encoder.pt2", "prompt.safetensors"])
def test_a_changed_short_or_absent_file_is_named(eager_bundle: Path, name: str) -> None:
    path = eager_bundle / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name} is damaged: its contents changed.*Export it"):
        open_bundle(eager_bundle)
    path.write_bytes(content[:-1])
    with pytest.raises(ModelError, match=rf"{name} is damaged: it has \d+ bytes and should have"):
        open_bundle(eager_bundle)
    path.unlink()
    with pytest.raises(ModelError, match=rf"lacks {name}\. Export it again"):
        open_bundle(eager_bundle)


def test_a_bad_manifest_is_refused(eager_bundle: Path) -> None:
    path = eager_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    for change, message in (
        ({"format": 99}, "has bundle format 99, and this fewshot-rt reads 1"),
        ({"roles": {}}, r"manifest\.json is damaged \(KeyError\('encoder'\)\)"),
        ({"files": {}}, r"manifest\.json is damaged"),
        ({"recipe": {"task": "t"}}, r"manifest\.json is damaged"),
    ):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(ModelError, match=message):
            open_bundle(eager_bundle)
    for text in ("", "[]", '{"format": 1'):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"manifest\.json is damaged .*Export it again"):
            open_bundle(eager_bundle)
    path.unlink()
    with pytest.raises(ModelError, match=r"is not a bundle: it has no manifest\.json"):
        open_bundle(eager_bundle)


def test_a_manifest_cannot_name_files_outside(eager_bundle: Path) -> None:
    path = eager_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    outside = eager_bundle.parent / "outside.pt2"
    outside.write_bytes((eager_bundle / "decoder.pt2").read_bytes())
    manifest["roles"]["decoder"]["file"] = "../outside.pt2"
    manifest["files"]["../outside.pt2"] = manifest["files"]["decoder.pt2"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"names a file outside: '\.\./outside\.pt2'"):
        open_bundle(eager_bundle)


@pytest.fixture
def wrong_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine whose encoder is a little off, by more than fp32 allows."""
    build = eager_engine.build

    def wrong(program: Any, path: Path, *, precision: str, examples: Any = ()) -> None:
        if program.role == "encoder":
            weights = program.exported.state_dict
            for name, value in weights.items():
                weights[name] = torch.nn.Parameter(value * (1 + 1e-3))
        build(program, path, precision=precision)

    with monkeypatch.context() as patch:
        patch.setattr(eager_engine, "build", wrong)
        yield


def test_nothing_that_fails_parity_is_written(
    wrong_engine: None, tiny_base: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    with pytest.raises(
        EngineError, match=r"encoder: 'first' differs from eager by .* allows 1e-05"
    ):
        export(tiny_base, folder, engine="eager")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_gives_nan_is_refused(tiny_base: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        next(tiny_base.autoencoder.encoder.parameters()).fill_(torch.nan)
    with pytest.raises(EngineError, match=r"encoder: \d+ values of 'first' are not finite"):
        export(tiny_base, tmp_path / "bundle", engine="eager")
    assert list(tmp_path.iterdir()) == []


def test_an_older_bundle_stays_until_the_new_one_is_whole(
    eager_bundle: Path, tiny_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_manifest(eager_bundle)
    steps = export_bundle(
        tiny_base,
        recipe=RECIPE,
        prompt=tiny_base.embed(""),
        engine="eager",
        precision="fp32",
        folder=eager_bundle,
        origin={},
    )
    next(steps)
    steps.close()  # as Ctrl-C would
    assert read_manifest(eager_bundle) == before
    assert leftovers(eager_bundle) == []
    with staged_bundle(eager_bundle) as staging:
        (staging / "manifest.json").write_text("{}")
        assert read_manifest(eager_bundle) == before
    assert [path.name for path in eager_bundle.iterdir()] == ["manifest.json"]
    assert leftovers(eager_bundle) == []


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "one.png").touch()
    with (
        pytest.raises(ConfigError, match="is not a bundle; it is not replaced"),
        staged_bundle(tmp_path / "photographs"),
    ):
        pass
    assert (tmp_path / "photographs" / "one.png").exists()


def test_a_full_disk_is_said_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(DataError, match="the disk is full"),
        staged_bundle(tmp_path / "bundle"),
        Path("/dev/full").open("wb") as full,
    ):
        full.write(bytes(1 << 16))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_brings_the_older_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text("old")
    rename = bundle_module.os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name.startswith(".part-"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(bundle_module.os, "rename", refuse)
    with pytest.raises(DataError, match="Permission denied"), staged_bundle(folder):
        pass
    assert (folder / "manifest.json").read_text() == "old"
    assert leftovers(folder) == []


def test_unknown_engine_and_precision(tiny_base: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown engine 'tensorflow'"):
        export(tiny_base, tmp_path / "bundle", engine="tensorflow")
    with pytest.raises(ConfigError, match="unknown precision of engine 'onnx' 'fp31'"):
        list(
            export_bundle(
                tiny_base,
                recipe=RECIPE,
                prompt=tiny_base.embed(""),
                engine="onnx",
                precision="fp31",
                folder=tmp_path / "bundle",
                origin={},
            )
        )

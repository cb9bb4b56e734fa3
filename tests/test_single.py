"""One file from images to answers.

References: Pillow's resizing; for the rest the eager predictor, whose codec works in NumPy.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from tiny import cogvideox, ltx, wan
from tiny.bundles import RECIPE, eager_predictor
from tiny.single import CODECS, COLOURS, Wrong, check_same, draw, open_file, write

from fewshot_rt import __version__, images
from fewshot_rt.adapter import Adapter, Provenance, add_lora, snapshot
from fewshot_rt.bases import open_base
from fewshot_rt.codecs import Codec
from fewshot_rt.errors import EngineError
from fewshot_rt.export import single
from fewshot_rt.images import Pixels
from fewshot_rt.predict import answer_images
from fewshot_rt.predictor import Predictor, Recipe, seeded_noises

SIZES = ((32, 32), (17, 45), (1, 9), (61, 1))
LABELLED = replace(RECIPE, codec=CODECS["labels"], steps=2, solver="dpm", start=0.9)


def shares(found: np.ndarray) -> np.ndarray:
    """Give the shares of the colours in pixels, the least first."""
    _, counts = np.unique(found.reshape(-1, 3), axis=0, return_counts=True)
    return np.sort(counts / counts.sum())


@pytest.mark.parametrize("given", [(1, 1), (5, 7), (16, 16), (200, 333), (3000, 17), (1, 37)])
@pytest.mark.parametrize("wanted", [(1, 1), (16, 16), (3, 11), (37, 1), (150, 400)])
def test_sides_are_resized_as_pillow_does(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    plane = np.random.default_rng(0).uniform(-1, 1, given).astype(np.float32)
    expected = Image.fromarray(plane).resize(wanted[::-1], Image.Resampling.BICUBIC)
    found = single.resize(torch.from_numpy(plane), wanted).numpy()
    np.testing.assert_allclose(found, np.asarray(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [*SIZES, (700, 431)])
def test_images_enter_as_they_do_in_a_bundle(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    expected = np.stack([images.to_model(image, (32, 48)) for image in pixels])
    found = single.to_model(torch.from_numpy(pixels), (32, 48)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [*SIZES, (211, 90)])
@pytest.mark.parametrize("name", CODECS)
def test_answers_leave_as_they_do_in_a_bundle(name: str, size: tuple[int, int]) -> None:
    codec = CODECS[name]
    # Beyond [-1, 1] in places, as answers may be.
    answers = (draw((32, 32), 3).transpose(0, 3, 1, 2) / 100 - 1.3).astype(np.float32)
    expected = [codec.decode(answer, size) for answer in answers]
    found = single.decode(codec, torch.from_numpy(answers), size).numpy()
    assert found.shape == (3, *size, 3)
    check_same(expected, found, codec)


@pytest.mark.parametrize(
    "way",
    [
        {"steps": 1, "noise": "zero", "start": 0.8},
        {"steps": 3, "noise": "seeded", "solver": "euler"},
        {"steps": 5, "noise": "seeded", "solver": "dpm"},
    ],
    ids=str,
)
def test_the_way_is_that_of_the_predictor(way: dict[str, Any], tiny_base: Any) -> None:
    check_way(tiny_base, replace(RECIPE, codec=Codec("rgb"), **way))


def test_frames_are_dropped_on_the_way(tmp_path: Path, make_text_encoder: Any) -> None:
    """Wan2.1's condition has all latent frames, so it is shortened, too."""
    base, recipe = open_family("wan", tmp_path / "base", make_text_encoder(is_multilingual=True))
    assert recipe.latent_shape[1] == 3
    check_way(base, replace(recipe, steps=3, drop_after=1))


def check_way(base: Any, recipe: Recipe) -> None:
    """Compare the module that is captured, before it is, with the predictor."""
    role = single.make_way(base, recipe, base.embed("mask"))
    pictures = draw((40, 27), 2)
    noise = [torch.from_numpy(seeded_noises(recipe, 1))] if recipe.noise == "seeded" else []
    with torch.no_grad():
        (found,) = role(torch.from_numpy(pictures), *noise)
    expected = answer_images(eager_predictor(base, recipe), list(pictures))
    assert np.std(found.numpy()) > 5
    check_same(expected, found.numpy(), recipe.codec)


def random_adapter(base: Any) -> Adapter:
    """Make an adapter that changes answers; it is attached to the base that is given."""
    torch.manual_seed(0)
    for _, parameter in add_lora(base, rank=4, alpha=8, seed=0):
        torch.nn.init.normal_(parameter, std=0.3)
    told = {"base": base.name, "revision": base.revision, "task": "dots", "digest": "d1gest"}
    return snapshot(
        base, Provenance(**told, shots=7, seed=3, objective="grid", steps=250, versions={})
    )


@pytest.fixture(scope="module")
def labelled(
    make_tiny_base: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Predictor]:
    """A file with an adapter merged into it; its reference is another base with the same."""
    base, other = make_tiny_base(), make_tiny_base()
    path = tmp_path_factory.mktemp("single") / "labelled.onnx"
    adapter = random_adapter(make_tiny_base())
    write(base, LABELLED, path, adapter=adapter)
    adapter.merge(other)
    return path, eager_predictor(other, LABELLED)


@pytest.mark.parametrize("size", [*SIZES, (90, 131)])
def test_a_file_answers_any_number_of_images_of_any_size(
    size: tuple[int, int], labelled: tuple[Path, Predictor]
) -> None:
    path, eager = labelled
    session = open_file(path)
    assert [i.name for i in session.get_inputs()] == ["image"]
    for count in (1, 2, 5):  # two more than the recipe's batch
        pictures = draw(size, count, seed=count)
        (found,) = session.run(None, {"image": pictures})
        check_same(answer_images(eager, list(pictures)), found, LABELLED.codec)
    assert len(shares(found)) > 1


def test_a_file_says_what_it_is(labelled: tuple[Path, Predictor]) -> None:
    known = open_file(labelled[0]).get_modelmeta().custom_metadata_map
    assert json.loads(known.pop("colours")) == [list(colour) for colour in COLOURS]
    assert known == {
        "fewshot-rt": __version__,
        "role": "answer",
        "task": "tiny",
        "codec": "labels",
        "height": "32",
        "width": "32",
        "steps": "2",
        "noise": "seeded",
        "base": "tiny",
        "revision": "0",
        "licence": "that of tiny",
        "precision": "fp32",
        "run": "dots-7",
        "task_digest": "d1gest",
        "shots": "7",
        "seed": "3",
        "objective": "grid",
        "updates": "250",
    }


def test_a_file_is_whole_and_named_well(labelled: tuple[Path, Predictor]) -> None:
    onnx.checker.check_model(str(labelled[0]), full_check=True)
    model = onnx.load(labelled[0])
    values = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.output)}
    axes = {name: [d.dim_param or d.dim_value for d in v.shape.dim] for name, v in values.items()}
    pixels = ["batch", "height", "width", 3]
    assert axes == {"image": pixels, "answer": pixels, "noise": ["noise_batch", 8, 2, 8, 8]}
    assert {v.elem_type for n, v in values.items() if n != "noise"} == {onnx.TensorProto.UINT8}
    typed = {v.name for v in model.graph.value_info} | set(axes)
    assert {name for node in model.graph.node for name in node.output} <= typed
    assert str(Path(__file__).parent.parent).encode() not in labelled[0].read_bytes()


def test_noise_may_be_left_out_or_given(labelled: tuple[Path, Predictor]) -> None:
    path, eager = labelled
    session = open_file(path)
    assert [i.name for i in session.get_overridable_initializers()] == ["noise"]
    pictures, noises = draw((32, 32), 3), seeded_noises(LABELLED, 3)

    def answer(**given: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run(None, {"image": pictures, **given})[0]
        return found

    np.testing.assert_array_equal(answer(), answer(noise=noises[:1]))
    # Each image from a noise of its own: the reference answers every image from every noise.
    entered = np.stack([images.to_model(picture, (32, 32)) for picture in pictures])
    expected = eager.answer_samples(entered, noises)[range(3), range(3)]
    decoded = [LABELLED.codec.decode(values, (32, 32)) for values in expected]
    check_same(decoded, answer(noise=noises), LABELLED.codec)
    assert (answer(noise=noises) != answer()).any(axis=(1, 2, 3)).tolist() == [False, True, True]


def test_the_python_of_the_readme_runs(
    labelled: tuple[Path, Predictor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = (Path(__file__).parents[1] / "README.md").read_text().split("## One file")[1]
    code = section.split("```python\n")[1].split("```")[0]
    path, eager = labelled
    shutil.copy(path, tmp_path / "model.onnx")
    (pixels,) = draw((50, 70))
    Image.fromarray(pixels).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == "tiny, by tiny (that of tiny)\n"
    found = np.asarray(Image.open("answer.png"))
    check_same(answer_images(eager, [pixels]), found[None], LABELLED.codec)


def one_in(share: int, levels: int) -> Callable[[Pixels], Pixels]:
    """Change one pixel in so many, in one channel."""

    def harm(answers: Pixels) -> Pixels:
        pixels = answers.reshape(-1, 3)
        changed = pixels[::share, 1].astype(int)
        pixels[::share, 1] = np.where(changed > 127, changed - levels, changed + levels)
        return pixels.reshape(answers.shape)

    return harm


@pytest.mark.parametrize(
    ("codec", "harm", "is_sound"),
    [
        ("rgb", one_in(200, 1), True),
        ("rgb", one_in(50, 1), False),
        ("rgb", one_in(200, 2), False),
        ("mask", one_in(200, 100), True),
        ("mask", one_in(50, 100), False),
    ],
)
def test_nothing_is_written_that_answers_otherwise(
    codec: str,
    harm: Callable[[Pixels], Pixels],
    is_sound: bool,
    tiny_base: Any,
    labelled: tuple[Path, Predictor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = replace(RECIPE, codec=CODECS[codec])
    path = tmp_path / "files" / "one.onnx"
    path.parent.mkdir()
    path.write_text("an older file")
    engine = Wrong(labelled[0], eager_predictor(tiny_base, recipe), harm)
    monkeypatch.setattr(single, "require_engine", lambda _: engine)
    monkeypatch.setattr(single, "capture", lambda *_, **__: SimpleNamespace(size_bytes=1))
    monkeypatch.setattr(single, "annotate", lambda *_, **__: None)
    if is_sound:
        write(tiny_base, recipe, path)
    else:
        with pytest.raises(EngineError, match=r"answers otherwise than PyTorch: \d\.\d% of the"):
            write(tiny_base, recipe, path)
        assert path.read_text() == "an older file"
    assert [file.name for file in path.parent.iterdir()] == ["one.onnx"]


def test_a_model_that_no_file_holds_is_refused(
    tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "capture", lambda *_, **__: SimpleNamespace(size_bytes=5 * 10**9))
    with pytest.raises(EngineError, match=r"cannot be one file: the weights have 5\.0 GB.*bundle"):
        write(tiny_base, RECIPE, tmp_path / "one.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_pocket_in_one_file(tmp_path: Path) -> None:
    base, path = open_base("pocket"), tmp_path / "pocket.onnx"
    latents = base.geometry.latent_shape(frames=5, height=128, width=128)
    recipe = replace(RECIPE, size=(128, 128), latent_shape=latents, steps=1, noise="zero")
    eager = write(base, recipe, path)
    assert path.stat().st_size < 24e6
    session = open_file(path)
    assert session.get_modelmeta().custom_metadata_map["licence"] == "Apache-2.0"
    for size, count in (((128, 128), 2), ((301, 77), 1)):
        pictures = draw(size, count)
        (found,) = session.run(None, {"image": pictures})
        check_same(answer_images(eager, list(pictures)), found, recipe.codec)
        assert len(shares(found)) == 2


FAMILIES = {
    "cogvideox": (lambda folder, text: cogvideox.write(folder, "1.0", text), (32, 48), 9),
    "ltx": (lambda folder, text: ltx.write(folder, "0.9.0", text), (64, 64), 9),
    "wan": (lambda folder, text: wan.write(folder, "2.1", text), (32, 48), 9),
}


def open_family(family: str, folder: Path, text: dict[str, Any]) -> tuple[Any, Recipe]:
    """Open a tiny base of another family; give a recipe for it that answers with pictures."""
    make, size, frames = FAMILIES[family]
    base = open_base(str(make(folder, text)))
    latents = base.geometry.latent_shape(frames=frames, height=size[0], width=size[1])
    recipe = Recipe(
        task="noise",
        codec=Codec("rgb"),
        metrics=(),
        size=size,
        latent_shape=latents,
        schedule=base.schedule.at(math.prod(latents[1:])),
        batch=base.batch,
    )
    return base, recipe


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cogvideox", "ltx"])
def test_other_families_in_one_file(family: str, tmp_path: Path, make_text_encoder: Any) -> None:
    base, recipe = open_family(family, tmp_path / "base", make_text_encoder())
    eager = write(base, recipe, tmp_path / "one.onnx")
    pictures = draw((45, 71), 2)
    (found,) = open_file(tmp_path / "one.onnx").run(None, {"image": pictures})
    assert np.std(found) > 5
    check_same(answer_images(eager, list(pictures)), found, recipe.codec)

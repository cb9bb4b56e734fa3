"""What fewer bits may cost. References: answers that are known to be right, or wrong by so much."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny.bundles import RECIPE, eager_predictor, pictures

from fewshot_rt.codecs import Codec
from fewshot_rt.errors import EngineError
from fewshot_rt.export import build
from fewshot_rt.export.build import export_bundle
from fewshot_rt.export.bundle import open_bundle, read_manifest
from fewshot_rt.export.engines import onnx as onnx_engine
from fewshot_rt.export.quality import MOST_MORE, MOST_SHARE, Quality, batches, judge_quality
from fewshot_rt.images import to_uint8
from fewshot_rt.predict import answer_images
from fewshot_rt.predictor import Predictor, Recipe
from fewshot_rt.schedule import Schedule
from fewshot_rt.spec import ROLES

SIZE = (16, 16)


def painter(wrong: int, *, codec: str = "mask", metric: str = "pixel_accuracy") -> Predictor:
    """A predictor that gives every image back, but for so many pixels that it inverts."""

    def decode(tensors: Any) -> dict[str, np.ndarray]:
        answers = tensors["latents"][:, :, -1].copy()
        rows = answers.reshape(*answers.shape[:2], -1)
        rows[..., :wrong] *= -1
        return {"image": answers}

    def denoise(tensors: Any) -> dict[str, np.ndarray]:
        return {"prediction": tensors["noisy"] - np.repeat(tensors["first"], 2, axis=2)}

    recipe = Recipe(
        task="same",
        codec=Codec(codec),
        metrics=(metric,),
        size=SIZE,
        latent_shape=(3, 2, *SIZE),
        schedule=Schedule(),
        batch=2,
    )
    runners = {
        "encoder": lambda tensors: {"first": tensors["image"][:, :, None]},
        "denoiser": denoise,
        "decoder": decode,
    }
    return Predictor(runners, prompt={}, recipe=recipe, origin="test")


def squares(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    masks = (rng.uniform(size=(count, *SIZE)) > 0.5).astype(np.uint8) * 255
    return [(np.repeat(mask[..., None], 3, axis=-1), mask) for mask in masks]


def test_equal_answers_are_as_good() -> None:
    quality = judge_quality(painter(0), painter(0), squares(3))
    assert quality == Quality("pixel_accuracy", 1.0, 1.0, 3)
    worse = judge_quality(painter(20), painter(20), squares(3))
    assert worse.eager == worse.engine == pytest.approx(1 - 20 / 256)


def test_answers_may_be_a_little_worse_and_no_more() -> None:
    # Of 256 pixels, 64 are wrong: an error of .25, so .2645 is the most.
    assert 67 / 256 < 64 / 256 * (1 + MOST_SHARE) + MOST_MORE < 68 / 256
    judged = judge_quality(painter(64), painter(67), squares(3))
    assert judged.engine == pytest.approx(1 - 67 / 256)
    with pytest.raises(EngineError, match=r"pixel_accuracy 0\.7344 on 3 pairs .* 0\.75 in PyTorch"):
        judge_quality(painter(64), painter(68), squares(3))
    with pytest.raises(EngineError, match="worse than PyTorch's"):
        judge_quality(painter(0), painter(1), squares(3))
    assert judge_quality(painter(64), painter(0), squares(3)).engine == 1.0  # better is welcome


def test_a_metric_whose_lower_end_is_better_counts_the_right_way() -> None:
    exact, off = (painter(wrong, codec="gray", metric="mae") for wrong in (0, 60))
    with pytest.raises(EngineError, match=r"mae 0\.234"):
        judge_quality(exact, off, squares(2))
    assert judge_quality(off, exact, squares(2)).engine == 0.0


def test_pairs_fill_batches_in_their_order() -> None:
    pairs = squares(5)
    found = list(batches(painter(0).recipe, pairs))
    assert [len(batch) for batch in found] == [2, 2, 1]
    expected = np.stack([image for image, _ in pairs]).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)


@pytest.fixture
def freeze(make_tiny_base: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """A function that exports a tiny base in int8."""

    def export(pairs: Any) -> Path:
        base = make_tiny_base()
        folder = tmp_path / "bundles" / "onnx-int8"
        steps = export_bundle(
            base,
            recipe=RECIPE,
            prompt=base.embed("mask"),
            engine="onnx",
            precision="int8",
            folder=folder,
            origin={},
            pairs=pairs,
        )
        stages = [(step.role, step.stage) for step in steps]
        assert stages[-3:] == [("answer", "parity"), ("answer", "quality"), ("answer", "write")]
        return folder

    return export


@pytest.fixture(scope="module")
def pairs(make_tiny_base: Callable[..., Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures, and as targets what PyTorch answers, so that it is right."""
    images = list(to_uint8(pictures(4).transpose(0, 2, 3, 1)))
    answers = answer_images(eager_predictor(make_tiny_base()), images)
    return list(zip(images, answers, strict=True))


def test_a_bundle_in_int8_says_how_good_it_is(freeze: Any, pairs: Any) -> None:
    folder = freeze(pairs)
    manifest = read_manifest(folder)
    quality = manifest["quality"]
    assert set(quality) == {"metric", "eager", "engine", "images"}
    assert (quality["metric"], quality["eager"], quality["images"]) == ("iou", 1.0, 4)
    assert 0.99 < quality["engine"] <= 1
    for role in ROLES:
        assert all(1e-6 < p["rel_l2"] <= 2e-2 for p in manifest["parity"][role].values())
    assert np.isfinite(open_bundle(folder).answer(pictures(2))).all()


def test_without_pairs_there_is_nothing_to_find_scales_on(freeze: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="finds the scales of int8 on the images that a run"):
        freeze([])
    assert not list((tmp_path / "bundles").glob("**/*.onnx"))


def test_a_bundle_whose_answers_are_worse_is_not_written(
    freeze: Any, pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are near enough, as they may be where a mask flips at once."""

    def spoiled(path: Path, *args: Any, **way: Any) -> Any:
        runner = load(path, *args, **way)
        if path.name != "decoder.onnx":
            return runner
        return lambda tensors: {name: -value for name, value in runner(tensors).items()}

    load = onnx_engine.load
    monkeypatch.setattr(onnx_engine, "load", spoiled)
    monkeypatch.setattr(build, "require", lambda *args, **way: None)
    with pytest.raises(EngineError, match="answers are worse than PyTorch's: iou"):
        freeze(pairs)
    assert not (tmp_path / "bundles" / "onnx-int8").exists()

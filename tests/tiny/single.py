"""What tests of single files share: codecs, pictures, ways to write and to open a file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from fewshot_rt.codecs import Codec
from fewshot_rt.export import single
from fewshot_rt.images import Pixels, with_channels
from fewshot_rt.predict import answer_images
from fewshot_rt.predictor import Predictor, Recipe
from fewshot_rt.runs import base_predictor

COLOURS = ((0, 0, 0), (250, 120, 0), (0, 90, 200), (255, 255, 255), (9, 9, 9))
CODECS = {
    "rgb": Codec("rgb"),
    "gray": Codec("gray"),
    "mask": Codec("mask"),
    "coloured mask": Codec("mask", ((10, 0, 90), (255, 200, 0))),
    "labels": Codec("labels", COLOURS),
    "gray labels": Codec("labels", ((0, 0, 0), (127, 127, 127), (255, 255, 255))),
}


def draw(size: tuple[int, int], count: int = 1, seed: int = 0) -> Pixels:
    """Draw smooth colours. Shapes: uint8 [B, H, W, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    taken = [Image.fromarray(c).resize(size[::-1], Image.Resampling.BILINEAR) for c in coarse]
    return np.stack([np.asarray(image) for image in taken])


def check_same(expected: list[Pixels], found: np.ndarray, codec: Codec) -> None:
    """Allow what rounding to levels allows: 1 pixel in 100, in pictures by 1 level."""
    assert found.dtype == np.uint8
    difference = np.abs(np.stack([with_channels(e) for e in expected]).astype(int) - found)
    assert (difference.max(axis=-1) > 0).mean() <= 0.01
    if codec.name in ("rgb", "gray"):
        assert difference.max() <= 1


def write(base: Any, recipe: Recipe, path: Path, **more: Any) -> Predictor:
    """Export a base as one file; give the eager predictor that is its reference."""
    prompt = base.embed("mask")
    origin = {"run": "dots-7", "acceleration": []}
    steps = list(
        single.export_single(base, recipe=recipe, prompt=prompt, path=path, origin=origin, **more)
    )
    judged = "parity" if more.get("precision", "fp32") == "fp32" else "quality"
    assert [step.stage for step in steps] == ["capture", "build", "load", judged, "write"]
    return base_predictor(base, recipe, prompt, origin="eager")


def open_file(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


class Wrong:
    """An engine whose file answers as eager does, but for what is done to the answers."""

    def __init__(self, file: Path, eager: Predictor, harm: Callable[[Pixels], Pixels]) -> None:
        self._file, self._eager, self._harm = file, eager, harm

    def build(self, program: Any, path: Path, **_: Any) -> None:
        shutil.copy(self._file, path)

    def load(self, path: Path, signature: Any) -> Callable[[Any], dict[str, Pixels]]:
        def runner(given: dict[str, Pixels]) -> dict[str, Pixels]:
            answers = answer_images(self._eager, list(given["image"]))
            return {"answer": self._harm(np.stack([with_channels(a) for a in answers]))}

        return runner

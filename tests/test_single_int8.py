"""One file in int8. References: the eager predictor, and onnx's own reading of a graph."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny.bundles import RECIPE, eager_predictor
from tiny.single import CODECS, Wrong, draw, open_file, write

from fewshot_rt.errors import ConfigError, EngineError
from fewshot_rt.export import single
from fewshot_rt.images import Pixels, with_channels
from fewshot_rt.predict import answer_images
from fewshot_rt.predictor import Predictor


def pairs_for(eager: Predictor, count: int) -> list[tuple[Pixels, Pixels]]:
    """Make pairs whose targets are what eager answers, so that any change is a loss."""
    pictures = [draw((30 + 8 * k, 41), seed=k)[0] for k in range(count)]
    return list(zip(pictures, answer_images(eager, pictures), strict=True))


@pytest.mark.parametrize("noise", ["zero", "seeded"])
def test_a_file_in_int8_is_smaller_and_as_good(noise: str, tiny_base: Any, tmp_path: Path) -> None:
    recipe = replace(RECIPE, noise=noise, steps=2)
    pairs = pairs_for(eager_predictor(tiny_base, recipe), 4)
    plain, small = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    write(tiny_base, recipe, plain)
    eager = write(tiny_base, recipe, small, precision="int8", pairs=pairs)
    assert small.stat().st_size < 0.8 * plain.stat().st_size  # the graph itself is half of it
    session = open_file(small)
    assert session.get_modelmeta().custom_metadata_map["precision"] == "int8"
    onnx.checker.check_model(str(small), full_check=True)
    graph = onnx.load(small).graph
    made_by = {output: node for node in graph.node for output in node.output}
    taken = [
        node.name
        for node in graph.node
        if node.op_type in ("MatMul", "Conv")
        and getattr(made_by.get(node.input[1]), "op_type", "") == "DequantizeLinear"
    ]
    for part in ("autoencoder.encoder.0", "blocks.0.attn1.to_q", "blocks.0.attn1.to_q/2"):
        assert any(name.endswith(part) for name in taken), part
    for size in ((32, 32), (61, 1)):  # and sizes that no scale was found on
        pictures = draw(size, 3)
        (found,) = session.run(None, {"image": pictures})
        expected = np.stack([with_channels(a) for a in answer_images(eager, list(pictures))])
        assert (found != expected).any(axis=-1).mean() < 0.05


def test_a_file_in_int8_that_answers_worse_is_not_written(
    tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, codec=CODECS["mask"])
    eager = eager_predictor(tiny_base, recipe)
    plain = tmp_path / "fp32.onnx"
    write(tiny_base, recipe, plain)
    given = {"precision": "int8", "pairs": pairs_for(eager, 3)}
    monkeypatch.setattr(single, "annotate", lambda *_, **__: None)
    for harm, is_sound in ((lambda answers: answers, True), (lambda answers: 255 - answers, False)):
        engine = Wrong(plain, eager, harm)
        monkeypatch.setattr(single, "require_engine", lambda _, engine=engine: engine)
        path = tmp_path / f"{is_sound}.onnx"
        if is_sound:
            write(tiny_base, recipe, path, **given)
        else:
            with pytest.raises(EngineError, match="answers are worse than PyTorch's: iou"):
                write(tiny_base, recipe, path, **given)
        assert path.exists() == is_sound
    with pytest.raises(EngineError, match="there are none"):
        write(tiny_base, recipe, tmp_path / "no.onnx", precision="int8")
    with pytest.raises(ConfigError, match="precision of one file"):
        write(tiny_base, recipe, tmp_path / "no.onnx", precision="bf16")

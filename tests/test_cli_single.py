"""`fewshot-rt export --single-file`: what is asked for, where the file goes, what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewshot_rt.export.build import BuildStep
from fewshot_rt.export.parity import Parity

SAME = Parity(rel_l2=0.0, max_abs=0.0, cosine=1.0, nan=0)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `export_single` is asked for; it writes a stand-in for the file."""
    asked = []

    def export(base: Any, *, path: Path, **given: Any) -> Iterator[BuildStep]:
        asked.append(given)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1234567")
        yield BuildStep(role="answer", stage="parity", seconds=0, parity={"answer": SAME})

    monkeypatch.setattr("fewshot_rt.export.single.export_single", export)
    return asked


def test_the_file_lies_beside_the_bundles_or_where_it_is_wanted(
    exported: Any, written: list[dict[str, Any]]
) -> None:
    status, out, err = exported("export", "one", "--single-file", "--json")
    assert status == 0, err
    path = "runs/one/bundles/onnx-fp32.onnx"
    expected = {"file": path, "size_bytes": 7, "parity": {"answer": 0.0}, "quality": None}
    assert json.loads(out) == expected
    assert Path(path).read_bytes() == b"1234567"
    (given,) = written
    assert (given["precision"], given["pairs"]) == ("fp32", [])
    assert given["origin"]["run"] == "one"
    assert given["adapter"].provenance.digest == given["origin"]["task_digest"]
    # The run's bundle is still what `predict` takes.
    assert json.loads(exported("predict", "pairs/test/input", "--json")[1])["model"].endswith(
        "bundles/onnx-fp32"
    )
    status, _, err = exported("export", "--single-file", "--out", "page/model.onnx")
    assert status == 0, err
    assert Path("page/model.onnx").is_file()
    status, _, err = exported("export", "--single-file", "--precision", "int8")
    assert status == 0, err
    assert Path("runs/one/bundles/onnx-int8.onnx").is_file()
    assert written[-1]["precision"] == "int8"
    assert written[-1]["pairs"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "aoti"], "made with --engine onnx alone, not aoti"),
        (["--precision", "bf16"], "made with --precision fp32 or int8 alone, not bf16"),
        (["--device", "cuda"], "made with --device cpu alone, not cuda"),
        (["--into", "runs/one/bundles/onnx-fp32"], "--single-file makes none"),
        (["--batch", "2"], "takes any number of images"),
        (["--out", "folder"], "needs a name that ends in .onnx"),
    ],
)
def test_what_one_file_cannot_have_is_refused(
    words: list[str], said: str, exported: Any, written: list[dict[str, Any]]
) -> None:
    status, _, err = exported("export", "one", "--single-file", *words)
    assert status == 2
    assert said in " ".join(err.split())
    assert written == []

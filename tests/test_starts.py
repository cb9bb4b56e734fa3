"""Cold starts. References: the sizes of files, and a process that does nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fewshot_rt.benchmarks.starts import NOTHING, bench_starts
from fewshot_rt.errors import FewshotError


def test_processes_are_timed_and_bundles_weighed(exported: Any) -> None:
    status, out, _ = exported("bench", "start", "--rounds", 2, "--results", "records", "--json")
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    record = result["record"]
    assert (record["kind"], record["reference"]) == ("start", NOTHING)
    assert set(record["variants"]) == {NOTHING, "onnx-fp32"}
    times = record["variants"]["onnx-fp32"]
    bundle = Path("runs/one/bundles/onnx-fp32")
    assert times["size_mb"] == sum(file.stat().st_size for file in bundle.iterdir()) / 1e6
    # An answer takes longer than an interpreter that does nothing, by more than noise.
    assert times["median_ms"] > 2 * record["variants"][NOTHING]["median_ms"]
    assert times["count"] == 2
    (written,) = Path("records").glob("*.jsonl")
    assert json.loads(written.read_text())["variants"] == record["variants"]
    assert "| onnx-fp32 |" in result["table"]


def test_what_does_not_answer_is_not_timed(exported: Any, tmp_path: Path) -> None:
    broken = Path(shutil.copytree("runs/one/bundles/onnx-fp32", tmp_path / "broken"))
    (broken / "decoder.onnx").unlink()
    image = next(Path("pairs/train/input").glob("*.png")).resolve()
    with pytest.raises(FewshotError, match=r"(?s)a process that was timed failed: .*lacks decoder"):
        bench_starts({"broken": broken}, image, rounds=1)


def test_a_run_without_bundles_says_what_to_do(trained: Any) -> None:
    shutil.rmtree("runs/one/bundles", ignore_errors=True)
    status, _, err = trained("bench", "start")
    assert status == 1
    assert "has no bundles. Make one: fewshot-rt export" in err

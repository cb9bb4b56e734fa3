"""`fewshot-rt bench latency` from the command line."""

import json

import pytest


@pytest.mark.slow
def test_all_ways_to_answer_are_timed_apart(exported, tmp_path):
    """Bundles hold as many images as they were made for, and the table has a row for each way."""
    status, _, err = exported("bench", "one", "--batch", "99", "--rounds", "1")
    assert status == 2
    assert "onnx-fp32 holds" in err
    assert "export it with --batch 99" in " ".join(err.split())
    words = ("bench", "one", "--batch", "2", "--rounds", "2", "--results", "kept", "--json")
    status, out, err = exported(*words)
    assert status == 0, err
    found = json.loads(out)["record"]
    assert set(found["variants"]) == {"plain", "eager", "onnx-fp32"}
    assert all(times["count"] == 2 for times in found["variants"].values())
    assert set(found["parity"]) == {"plain", "onnx-fp32"}
    assert len(list((tmp_path / "kept").glob("*.jsonl"))) == 1


def test_bench_without_a_name_is_latency(run):
    assert run("bench", "no-such-run")[0] == 1
    assert run("bench", "--rounds", "0")[0] == 2
    status, out, _ = run("bench", "--help")
    assert status == 0
    assert "latency" in out
    assert "tasks" in out

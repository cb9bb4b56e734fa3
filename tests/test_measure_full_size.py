"""The measurement of known bases, rehearsed to its last line: one block, few pixels, no GPU."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fewshot_rt.benchmarks.full_size import main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("Lightricks/LTX-Video", (64, 96)), ("zai-org/CogVideoX1.5-5B-I2V", (32, 48))],
)
def test_one_update_and_one_answer_are_measured(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    options = ["--layers", "1", "--size", f"{size[1]}x{size[0]}", "--results", str(tmp_path)]
    result = CliRunner().invoke(main, [name, *options, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.jsonl")
    record = json.loads(path.read_text())
    assert (record["kind"], record["case"]) == ("full-size", name)
    assert record["settings"]["size"] == list(size)
    assert (record["settings"]["layers"], record["settings"]["frames"]) == (1, 9)
    assert set(record["variants"]) == {"update", "answer", "offloaded answer"}
    assert all(figures["ms"] > 0 for figures in record["variants"].values())
    assert record["floor"]["estimated update gb"] > record["floor"]["estimated answer gb"] > 1


def test_what_is_not_known_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["LTX-Vidio", "--device", "cpu", "--results", str(tmp_path)])
    assert result.exit_code == 1
    assert "Lightricks/LTX-Video" in result.output
    assert not list(tmp_path.iterdir())

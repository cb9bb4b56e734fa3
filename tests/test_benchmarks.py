"""References: a clock that the test winds, counted FLOPs of known shapes, the eager predictor."""

import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny.bundles import eager_predictor
from tiny.doubling import double, make_double

from fewshot_rt.benchmarks import floor as floor_module
from fewshot_rt.benchmarks.floor import Floor, count_bytes, count_flops, find_floor
from fewshot_rt.benchmarks.machine import Machine, describe_machine
from fewshot_rt.benchmarks.plain import plain_loop
from fewshot_rt.benchmarks.record import Record, append_record, commit, read_records
from fewshot_rt.benchmarks.report import make_table, replace_block, update_document
from fewshot_rt.benchmarks.run import bench_predict
from fewshot_rt.benchmarks.timing import interleave, summarise
from fewshot_rt.benchmarks.ways import Apart, open_way
from fewshot_rt.codecs import Codec
from fewshot_rt.errors import ConfigError, DataError, EngineError, FewshotError
from fewshot_rt.export.parity import compare, require
from fewshot_rt.predictor import Recipe
from fewshot_rt.schedule import Schedule

RECIPE = Recipe(
    task="tiny",
    codec=Codec("rgb"),
    metrics=("psnr",),
    size=(32, 32),
    latent_shape=(8, 2, 8, 8),
    schedule=Schedule(shift=3.0),
    steps=3,
    noise="seeded",
    batch=2,
)
FLOOR = Floor(flops=4_000_000, weight_bytes=1_000_000, flops_per_second=2e9, bytes_per_second=1e10)


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (count, 3, 32, 32)).astype(np.float32)


def record(**changes: Any) -> Record:
    times = {"median_ms": 20.0, "p10_ms": 19.0, "p90_ms": 25.0, "count": 5, "first_ms": 90.0}
    parity = {"rel_l2": 2e-7, "max_abs": 1e-6, "cosine": 1.0, "nan": 0}
    record = Record(
        case="tiny",
        images=2,
        reference="eager",
        variants={"plain": {**times, "median_ms": 40.0}, "eager": times, "onnx-fp32": times},
        parity={"plain": parity, "onnx-fp32": parity},
        floor=FLOOR.to_dict(),
        settings={},
    )
    return replace(record, **changes)


class Wound:
    """A clock that only moves when a variant winds it."""

    def __init__(self) -> None:
        self.seconds, self.order = 0.0, ""

    def variant(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.order += name
            self.seconds += seconds

        return run


def test_variants_take_turns_and_warmup_is_not_kept() -> None:
    clock = Wound()
    variants = {name: clock.variant(name, t) for name, t in (("a", 0.5), ("b", 0.25), ("c", 2.0))}
    samples = interleave(variants, rounds=3, warmup=1, clock=lambda: clock.seconds)
    assert samples == {"a": [500.0] * 3, "b": [250.0] * 3, "c": [2000.0] * 3}
    assert clock.order == "abcbcacababc"
    # Calls ahead of the one that is timed do not count.
    clock.order = ""
    samples = interleave(variants, rounds=2, warmup=0, lead=1, clock=lambda: clock.seconds)
    assert samples == {"a": [500.0] * 2, "b": [250.0] * 2, "c": [2000.0] * 2}
    assert clock.order == "aabbccbbccaa"
    with pytest.raises(ValueError, match="at least 1 round, not 0"):
        interleave(variants, rounds=0)


def test_quantiles_of_eleven_times() -> None:
    summary = summarise([float(value) for value in range(10, -1, -1)])
    assert summary.to_dict() == {"median_ms": 5.0, "p10_ms": 1.0, "p90_ms": 9.0, "count": 11}


def test_the_machine_is_described_without_its_name() -> None:
    machine = describe_machine()
    assert machine.cores >= 1
    assert machine.python == platform.python_version()
    text = json.dumps(machine.to_dict())
    assert str(Path.home()) not in text
    assert set(machine.to_dict()) == {"cpu", "cores", "memory_gib", "system", "python", "gpu"}


def test_the_slug_of_a_machine() -> None:
    machine = Machine(
        cpu="Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz",
        cores=2,
        memory_gib=7,
        system="Linux x86_64",
        python="3.10.1",
        gpu=None,
    )
    assert machine.slug == "intel-xeon-platinum-8370c-2-cores"
    assert replace(machine, gpu="NVIDIA L4").slug == "nvidia-l4-2-cores"


@pytest.mark.parametrize("noise", ["zero", "seeded"])
def test_the_plain_loop_answers_as_the_predictor_does(tiny_base: Any, noise: str) -> None:
    recipe = replace(RECIPE, noise=noise)
    plain = plain_loop(
        tiny_base,
        prompt=tiny_base.embed("mask"),
        recipe=recipe,
        decode=tiny_base.autoencoder.decode,
    )
    expected = eager_predictor(tiny_base, recipe).answer(images())
    parities = compare({"image": expected}, {"image": plain(images())})
    require(parities, role="plain", tolerance="fp32")
    curved = replace(recipe, schedule=Schedule(kind="v"))
    with pytest.raises(ConfigError, match="'flow' with trailing times alone"):
        plain_loop(tiny_base, prompt={}, recipe=curved, decode=tiny_base.autoencoder.decode)


def test_flops_grow_with_steps_and_batch_and_hold_the_attention(tiny_base: Any) -> None:
    def flops(**changes: int) -> int:
        return count_flops(eager_predictor(tiny_base, replace(RECIPE, **changes)))

    one, two = flops(steps=1, batch=1), flops(steps=2, batch=1)
    assert flops(steps=3, batch=1) - two == two - one > 0
    # The prompt is repeated over the batch, so all of the work is per image.
    assert flops(steps=2, batch=2) == 2 * two
    # One layer, 16 tokens: q, k, v, out of self-attention; q, out of cross-attention; feed-forward.
    tokens, width, hidden = 4 * 4, 64, 64
    linear = 2 * tokens * width * (6 * width + 2 * hidden)
    attention = 2 * 2 * tokens * width * (tokens + 4)
    assert linear + attention < two - one < 3 * (linear + attention)


def test_floor_arithmetic(tiny_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (FLOOR.arithmetic_ms, FLOOR.traffic_ms, FLOOR.floor_ms) == (2.0, 0.1, 2.0)
    parameters = sum(p.numel() for p in tiny_base.denoiser().parameters())
    assert count_bytes(tiny_base, steps=3) - count_bytes(tiny_base, steps=1) == 8 * parameters
    monkeypatch.setattr(floor_module, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(floor_module, "MATRIX", 64)
    found = find_floor(tiny_base, eager_predictor(tiny_base, RECIPE))
    assert found.flops_per_second > 1e6
    assert found.bytes_per_second > 1e6
    assert json.loads(json.dumps(found.to_dict()))["floor_ms"] > 0


def test_a_run_measures_all_variants_after_the_gate(tiny_base: Any) -> None:
    predictor = eager_predictor(tiny_base, RECIPE)

    def slow(pixels: np.ndarray) -> np.ndarray:
        time.sleep(0.05)
        return predictor.answer(pixels) * np.float32(1 + 1e-6)

    variants = {"slow": slow, "eager": predictor.answer}
    found = bench_predict(variants, images(), case="tiny", floor=FLOOR, rounds=3, warmup=0)
    assert list(found.variants) == ["slow", "eager"]
    assert found.variants["slow"]["median_ms"] > max(50, found.variants["eager"]["median_ms"])
    assert found.variants["eager"]["count"] == 3
    assert found.parity["slow"]["rel_l2"] == pytest.approx(1e-6, rel=0.2)
    assert set(found.parity) == {"slow"}
    assert found.settings == {"rounds": 3, "warmup": 0, "lead": 3, "size": [32, 32]}


def test_a_way_apart_answers_from_a_process_of_its_own() -> None:
    way = Apart("double", make_double)
    found = bench_predict({"eager": way}, images(), case="tiny", floor=FLOOR, rounds=2, warmup=0)
    assert found.variants["eager"]["count"] == 2
    np.testing.assert_array_equal(way(images()), double(images()))
    with pytest.raises(ConfigError, match="at most 1"):
        way(images() + 2)
    with pytest.raises(FewshotError, match="no-such-run"):
        Apart("eager", partial(open_way, Path("no-such-run"), "eager", batch=1))
    way = Apart("double", make_double)
    with pytest.raises(EngineError, match="double: its process ended with status 3"):
        way(images() - 2)
    # Whatever is asked after the end, too.
    for ask in (way.again, partial(way, images())):
        with pytest.raises(EngineError, match="double: its process ended"):
            ask()


def test_without_parity_there_is_no_number(tiny_base: Any) -> None:
    predictor = eager_predictor(tiny_base, RECIPE)
    calls = []

    def wrong(pixels: np.ndarray) -> np.ndarray:
        calls.append(len(pixels))
        return predictor.answer(pixels) * np.float32(1.001)

    with pytest.raises(EngineError, match=r"wrong: 'image' differs from eager by 1\.0e-03"):
        bench_predict(
            {"wrong": wrong, "eager": predictor.answer}, images(), case="tiny", floor=FLOOR
        )
    assert calls == [2]
    with pytest.raises(ConfigError, match="unknown variant 'eager'"):
        bench_predict({"onnx": wrong}, images(), case="tiny", floor=FLOOR)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    early, late = record(date="2026-01-02T03:04:05+00:00"), record(date="2026-01-02T04:00:00+00:00")
    for item in (late, early):
        path = append_record(item, tmp_path)
    assert path.name == f"2026-01-02-{describe_machine().slug}.jsonl"
    assert read_records(tmp_path) == [early, late]
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(DataError, match=r"jsonl:3 is not a record"):
        read_records(tmp_path)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        append_record(record(), tmp_path / "file")


def test_the_commit_of_a_repository_and_of_none(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    folder = tmp_path / "repository" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "a.py").touch()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "core.hooksPath="]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *arguments], cwd=folder.parent, check=True)
    head = commit(folder)
    assert head is not None
    assert not head.endswith("+")
    (folder.parent / "b.py").touch()
    assert commit(folder) == f"{head}+"


def test_the_table_says_what_the_record_says() -> None:
    table = make_table(record())
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[:5]]
    assert rows[0][5] == "against plain"
    assert rows[2] == ["plain", "40.0 ms", "19.0 ms", "25.0 ms", "50.0", "1.00x", "90 ms", "2e-07"]
    assert rows[3][4:] == ["100.0", "2.00x", "90 ms", "reference"]
    assert "Floor: 2.0 ms (0.0 GFLOP at 2 GFLOP/s measured)" in table
    assert f"torch {torch.__version__}" in table


def test_only_the_marked_part_of_a_document_changes(tmp_path: Path) -> None:
    append_record(record(date="2026-01-01T00:00:00+00:00", case="tiny"), tmp_path)
    readme = tmp_path / "README.md"
    text = "# Title\n<!-- bench:tiny -->\nold\n<!-- /bench:tiny -->\nend\n"
    readme.write_text(text)
    assert update_document(readme, tmp_path) == ["tiny"]
    written = readme.read_text()
    assert written.startswith("# Title\n<!-- bench:tiny -->\n| way |")
    assert written.endswith("\n<!-- /bench:tiny -->\nend\n")
    assert "old" not in written
    assert replace_block(written, "tiny", "old") == text
    # A cell of learning that is called the same, and is newer, has its table elsewhere.
    settings = {"group": "world", "moves": False, "metric": "iou", "shots": 3, "seed": 0}
    settings |= {"size": 32, "test": 2, "steps": 1, "base": "pocket", "revision": "a"}
    cell = {"kind": "learning", "variants": {"copy": {"iou": 1.0, "error": 0.5}}}
    append_record(record(date="2026-01-02", case="tiny", settings=settings, **cell), tmp_path)
    update_document(readme, tmp_path)
    assert readme.read_text() == written
    with pytest.raises(DataError, match=r"<!-- /bench:tiny --> are not both there"):
        replace_block("<!-- bench:tiny -->", "tiny", "")
    readme.write_text(text.replace("tiny", "huge"))
    with pytest.raises(DataError, match=r"marks bench:huge, but .* holds no record of it"):
        update_document(readme, tmp_path)

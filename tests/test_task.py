"""References: folders made by hand, with every fault that a folder of pairs can have."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewshot_rt.codecs import Codec
from fewshot_rt.errors import ConfigError, DataError
from fewshot_rt.pairs import find_pairs
from fewshot_rt.task import Pair, Task, lint, load_pair
from fewshot_rt.transition import Transition


def put(path: Path, seed: int, *, size: tuple[int, int] = (6, 8)) -> Path:
    """Save noise that depends on a seed alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def put_pairs(folder: Path, names: list[str], *, first: int = 0) -> Path:
    for number, name in enumerate(names, start=first):
        put(folder / "input" / f"{name}.png", number)
        put(folder / "target" / f"{name}.png", 1000 + number)
    return folder


def problems(folder: Path) -> list[tuple[str, str]]:
    return [(problem.kind, problem.severity) for problem in lint(folder)]


def test_folders_with_any_suffix_and_depth(tmp_path: Path) -> None:
    for name, partner in [("a.PNG", "a.bmp"), ("sub/b.TIF", "sub/b.webp"), ("c.jpeg", "c.Jpg")]:
        put(tmp_path / "input" / name, 1)
        put(tmp_path / "target" / partner, 2)
    task = Task.load(tmp_path)
    assert [pair.name for pair in task.pairs] == ["a", "c", "sub/b"]
    assert task.pairs[2] == Pair(
        "sub/b", tmp_path / "input/sub/b.TIF", tmp_path / "target/sub/b.webp", "train"
    )
    assert task.name == tmp_path.name
    assert (task.prompt, task.transition, task.codec) == ("", Transition(), Codec("rgb"))
    assert task.metrics[0] == "psnr"


def test_splits_in_folders(tmp_path: Path) -> None:
    put_pairs(tmp_path / "train", ["a", "b"])
    put_pairs(tmp_path / "test", ["a"], first=5)
    task = Task.load(tmp_path)
    assert [(pair.name, pair.split) for pair in task.pairs] == [
        ("train/a", "train"),
        ("train/b", "train"),
        ("test/a", "test"),
    ]
    assert [pair.name for pair in task.split("test").pairs] == ["test/a"]
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        task.split("training")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables(tmp_path: Path, kind: str) -> None:
    rows = [
        {"input": "x/a.png", "target": "y/a.png", "split": "train"},
        {"input": "x/b.png", "target": "y/a.png", "split": "test"},
        {"input": "x/a.png", "target": "y/c.png"},
    ]
    for number, name in enumerate(["x/a", "x/b", "y/a", "y/c"]):
        put(tmp_path / f"{name}.png", number)
    if kind == "csv":
        lines = ["input, target, split", *(", ".join(row.values()) for row in rows)]
        lines.insert(2, "")
        (tmp_path / "pairs.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    else:
        (tmp_path / "pairs.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    task = Task.load(tmp_path)
    assert [(pair.name, pair.split) for pair in task.pairs] == [
        ("x/a", "train"),
        ("x/b", "test"),
        ("x/a-2", "train"),
    ]
    assert task.pairs[1].target == tmp_path / "y/a.png"
    assert problems(tmp_path) == [("contradiction", "warning")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pairs.csv", "", "no column input and target"),
        ("pairs.csv", "input;target\na;b", "no column .* first line is 'input;target'"),
        ("pairs.csv", "input,target\n", "lists no pair"),
        ("pairs.csv", "input,target\na.png,none.png", "line 2: the target none.png does not exist"),
        ("pairs.csv", "input,target\na.png", "line 2: target is None, not a path"),
        ("pairs.csv", "input,target,split\na.png,b.png,tset", "Did you mean 'test'"),
        ("pairs.jsonl", '{"input": "a.png"', "line 1: not JSON"),
        ("pairs.jsonl", '["a.png", "b.png"]', 'line 1: write {"input"'),
        ("pairs.jsonl", '{"input": 3, "target": "b.png"}', "input is 3, not a path"),
    ],
)
def test_faults_of_tables(tmp_path: Path, name: str, text: str, message: str) -> None:
    for number, letter in enumerate("ab"):
        put(tmp_path / f"{letter}.png", number)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        Task.load(tmp_path)
    assert lint(tmp_path)[0].severity == "error"


def test_a_table_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        Task.load(tmp_path)


def test_unused_columns_and_ignored_folders_are_warned_of(tmp_path: Path) -> None:
    put_pairs(tmp_path, ["a", "b"])
    lines = ["input,target,spilt", *(f"input/{n}.png,target/{n}.png,test" for n in "ab")]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    found = lint(tmp_path)
    assert [problem.kind for problem in found] == ["table", "ignored"]
    assert "Did you mean 'split'" in found[0].message
    assert len(Task.load(tmp_path).pairs) == 2


def test_orphans_on_either_side_are_named_with_the_nearest(tmp_path: Path) -> None:
    put_pairs(tmp_path, ["a", "b"])
    put(tmp_path / "input" / "cell_01.png", 7)
    put(tmp_path / "target" / "cell_01_mask.png", 8)
    assert problems(tmp_path) == [("orphan", "error")] * 2
    with pytest.raises(DataError) as caught:
        Task.load(tmp_path)
    text = str(caught.value)
    assert "cell_01.png has no target" in text
    assert f"Did you mean {tmp_path / 'target/cell_01_mask.png'}?" in text
    assert "cell_01_mask.png has no input" in text


def test_unequal_sizes_are_named_with_both(tmp_path: Path) -> None:
    put_pairs(tmp_path, ["a", "b"])
    put(tmp_path / "target" / "b.png", 3, size=(6, 9))
    assert problems(tmp_path) == [("size", "error")]
    with pytest.raises(DataError, match=r"input/b\.png is 8x6, but .*target/b\.png is 9x6"):
        Task.load(tmp_path)


def test_damaged_images_and_two_of_one_stem(tmp_path: Path) -> None:
    put_pairs(tmp_path, ["a", "b", "c"])
    broken = tmp_path / "input" / "a.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "target" / "a.png").write_bytes(b"")
    put(tmp_path / "input" / "b.jpg", 2)
    assert sorted(problems(tmp_path)) == [("duplicate", "error"), *[("unreadable", "error")] * 2]
    with pytest.raises(DataError, match=r"(?s)b\.jpg and .*b\.png.*a\.png: cannot.*file is empty"):
        Task.load(tmp_path)


def test_all_errors_are_listed_up_to_ten(tmp_path: Path) -> None:
    for number in range(13):
        put(tmp_path / "input" / f"{number:02d}.png", number)
    put(tmp_path / "target" / "zzz.png", 99)
    with pytest.raises(DataError) as caught:
        Task.load(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 10 + 1
    assert lines[-1] == "- and 4 more"


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    for folder, message in [
        (tmp_path / "none", "does not exist"),
        (put(tmp_path / "a.png", 0), "is a file"),
        (tmp_path, r"no input/ and no target/ \(found: a\.png, inputs\)"),
    ]:
        with pytest.raises(DataError, match=message):
            Task.load(folder)
    for side in ("input", "target"):
        (tmp_path / side).mkdir()
    with pytest.raises(DataError, match="no images in input/ and target/"):
        Task.load(tmp_path)
    assert problems(tmp_path) == [("empty", "error")]


def test_warnings(tmp_path: Path) -> None:
    put_pairs(tmp_path / "train", ["a"])
    put_pairs(tmp_path / "test", ["b"])  # the same content as train/a
    put(tmp_path / "test/input/c.png", 5)
    put(tmp_path / "test/target/c.png", 5)
    (tmp_path / "train/input/notes.txt").touch()
    (tmp_path / "train/input/.DS_Store").touch()
    found = {problem.kind: problem for problem in lint(tmp_path)}
    assert sorted(found) == ["few", "identical", "leak", "unsupported"]
    assert {problem.severity for problem in found.values()} == {"warning"}
    assert "notes.txt" in found["unsupported"].message
    assert "test/input/b.png" in found["leak"].message
    assert "train/input/a.png" in found["leak"].message
    assert len(Task.load(tmp_path).pairs) == 3


def test_a_sound_folder_has_no_problem(tmp_path: Path) -> None:
    assert lint(put_pairs(tmp_path, ["a", "b"])) == []


def test_settings(tmp_path: Path) -> None:
    put_pairs(tmp_path, ["a", "b"])
    settings = tmp_path / "task.toml"
    settings.write_text(
        'name = "n"\nprompt = "p"\nmetrics = ["mae"]\ncodec = "gray"\n'
        '[transition]\nkind = "tiles"\nframes = 9\nseed = 4\n'
    )
    task = Task.load(tmp_path)
    assert (task.name, task.prompt, task.metrics) == ("n", "p", ("mae",))
    assert task.transition == Transition(kind="tiles", frames=9, seed=4)
    assert task.codec == Codec("gray")
    settings.write_text('transition = "linear"\n[codec]\nname = "mask"\ncolours = [3, 9]\n')
    task = Task.load(tmp_path)
    assert task.transition == Transition(kind="linear")
    assert task.codec == Codec("mask", ((3, 3, 3), (9, 9, 9)))
    assert lint(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "task.toml"),
        ('promt = "x"', "Did you mean 'prompt'"),
        ("name = 3", "name must be text, not 3"),
        ('metrics = "iou"', "metrics must be a list"),
        ('metrics = ["pnsr"]', "Did you mean 'psnr'"),
        ('metrics = ["iou"]', "'iou' does not fit codec 'rgb'"),
        ("metrics = [3]", "unknown metric '3'"),
        ('transition = "linaer"', "Did you mean 'linear'"),
        ("transition = {frame = 5}", "Did you mean 'frames'"),
        ('transition = {frames = "5"}', "frames must be a whole number"),
        ("transition = {frames = 1}", "at least 2 frames"),
        ('codec = "masc"', "Did you mean 'mask'"),
        ('codec = {name = "mask", colors = [0, 1]}', "Did you mean 'colours'"),
    ],
)
def test_faults_of_settings(tmp_path: Path, text: str, message: str) -> None:
    put_pairs(tmp_path, ["a", "b"])
    (tmp_path / "task.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Task.load(tmp_path)
    assert problems(tmp_path) == [("config", "error")]


def test_the_codec_comes_from_the_targets_for_training(tmp_path: Path) -> None:
    put_pairs(tmp_path / "test", ["a"])
    for name in "bc":
        put(tmp_path / "train/input" / f"{name}.png", ord(name))
        (tmp_path / "train/target").mkdir(exist_ok=True)
        mask = np.arange(48).reshape(6, 8) % 2
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"train/target/{name}.png")
    task = Task.load(tmp_path)
    assert task.codec == Codec("mask", ((0, 0, 0), (1, 1, 1)))
    source, target = load_pair(task.pairs[0], task.codec)
    assert source.shape == (6, 8, 3)
    np.testing.assert_array_equal(target, np.repeat(mask[..., None] * 255, 3, axis=-1))


def test_shots_are_nested_and_reproducible(tmp_path: Path) -> None:
    put_pairs(tmp_path / "train", list("abcdefgh"))
    put_pairs(tmp_path / "test", ["z"], first=50)
    task = Task.load(tmp_path)
    for seed in range(5):
        draws = [task.shots(count, seed).pairs for count in range(1, 9)]
        for fewer, more in itertools.pairwise(draws):
            assert more[: len(fewer)] == fewer
        assert len(set(draws[-1])) == 8
        assert task.shots(3, seed) == task.shots(3, seed)
    assert len({task.shots(3, seed).pairs for seed in range(5)}) > 1
    assert {pair.split for pair in task.shots(8, 0).pairs} == {"train"}
    for count in (0, 9):
        with pytest.raises(DataError, match=f"{count} shots .* has 8 pairs"):
            task.shots(count, 0)


def test_digests_depend_on_content_alone(tmp_path: Path) -> None:
    task = Task.load(put_pairs(tmp_path / "one", ["a", "b", "c"]))
    moved = Task.load(put_pairs(tmp_path / "two", ["x", "y", "z"]))
    assert task.digest() == moved.digest()
    assert len(task.digest()) == 16
    assert task.shots(3, 1).digest() == task.digest()
    digests = {task.digest(), task.shots(2, 0).digest()}
    (tmp_path / "two/task.toml").write_text('prompt = "p"')
    digests.add(Task.load(tmp_path / "two").digest())
    (tmp_path / "two/task.toml").write_text('transition = "linear"')
    digests.add(Task.load(tmp_path / "two").digest())
    (tmp_path / "two/task.toml").write_text('codec = "gray"')
    digests.add(Task.load(tmp_path / "two").digest())
    put(tmp_path / "one/target/a.png", 77)
    digests.add(Task.load(tmp_path / "one").digest())
    assert len(digests) == 6


def test_tasks_go_through_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task.load(put_pairs(tmp_path, ["a", "b"]))
    again = Task.from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task
    monkeypatch.chdir(tmp_path)
    relative = Task.load(Path())
    assert relative.name == tmp_path.name
    assert Task.from_dict(relative.to_dict()).pairs == task.pairs
    damaged = task.to_dict()
    del damaged["codec"]
    with pytest.raises(DataError, match="the task is damaged"):
        Task.from_dict(damaged)


def test_finding_pairs_reads_no_pixels(tmp_path: Path) -> None:
    for side in ("input", "target"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.png").touch()
    pairs, found = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["a"]
    assert found == []

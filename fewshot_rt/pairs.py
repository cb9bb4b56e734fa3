"""Pairs of images in a folder: how they are found, and what may be wrong with them."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from .errors import DataError, unknown
from .images import EXTENSIONS, Pixels, find_images, read_image

SIDES = ("input", "target")
SPLITS = ("train", "test")
TABLES = ("pairs.csv", "pairs.jsonl")
COLUMNS = (*SIDES, "split")
LAYOUT = "input/ and target/ with the same names, or pairs.csv or pairs.jsonl with input,target"


@dataclass(frozen=True)
class Pair:
    """Two image files of one size: what is given and what is wanted. split: "train" or "test"."""

    name: str
    source: Path
    target: Path
    split: str = "train"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a folder of pairs. severity: "error" (cannot be used) or "warning"."""

    kind: str
    message: str
    severity: str = "error"


def find_pairs(folder: Path) -> tuple[list[Pair], list[Problem]]:
    """Find the pairs of a folder by their names alone, sorted, and what keeps others from being.

    A table is taken before `train/` and `test/` sub-folders, and these before `input/` and
    `target/`. A pair is named by the path of its input, without the suffix.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        return [], [Problem("empty", f"{folder} {what}. Give a folder with {LAYOUT}.")]
    splits = [split for split in SPLITS if (folder / split).is_dir()]
    sides = [side for side in SIDES if (folder / side).is_dir()]
    for table in (folder / name for name in TABLES):
        if table.is_file():
            pairs, problems = _in_table(table)
            return pairs, problems + _ignored(folder, splits + sides, reason=table.name)
    if not splits:
        return _in_sides(folder, split="train", prefix="")
    found = [_in_sides(folder / split, split=split, prefix=f"{split}/") for split in splits]
    problems = [problem for _, some in found for problem in some]
    reason = " and ".join(f"{split}/" for split in splits)
    return [pair for some, _ in found for pair in some], problems + _ignored(
        folder, sides, reason=reason
    )


def inspect_pairs(pairs: Iterable[Pair]) -> list[Problem]:
    """Read all images and report damaged ones, unequal sizes, copies, contradictions and leaks."""
    problems: list[Problem] = []
    contents: dict[Pair, tuple[str, str]] = {}
    for pair in pairs:
        source, target = (_read(path) for path in (pair.source, pair.target))
        problems += [image for image in (source, target) if isinstance(image, Problem)]
        if not isinstance(source, Problem) and not isinstance(target, Problem):
            problems += _compare(pair, source, target)
            contents[pair] = _content(source), _content(target)
    return [*problems, *_contradictions(contents), *_leaks(contents)]


def _read(path: Path) -> Pixels | Problem:
    try:
        return read_image(path)
    except DataError as error:
        return Problem("unreadable", str(error))


def _ignored(folder: Path, names: list[str], *, reason: str) -> list[Problem]:
    if not names:
        return []
    listed = ", ".join(f"{name}/" for name in names)
    return [Problem("ignored", f"{folder}: {listed} ignored, for there is {reason}.", "warning")]


def _in_sides(folder: Path, *, split: str, prefix: str) -> tuple[list[Pair], list[Problem]]:
    """Pair the files of `input/` and `target/` by their paths without suffix."""
    missing = [side for side in SIDES if not (folder / side).is_dir()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        absent = " and no ".join(f"{side}/" for side in missing)
        return [], [Problem("empty", f"{folder} has no {absent} (found: {found}). Give {LAYOUT}.")]
    problems = [problem for side in SIDES for problem in _unsupported(folder / side)]
    inputs, targets = (_by_stem(folder / side) for side in SIDES)
    if not inputs and not targets:
        return [], [*problems, Problem("empty", f"{folder} has no images in input/ and target/.")]
    for stems in (inputs, targets):
        problems += [_duplicate(paths) for paths in stems.values() if len(paths) > 1]
    problems += _orphans(inputs, targets, missing=folder / "target")
    problems += _orphans(targets, inputs, missing=folder / "input")
    common = [stem for stem in inputs if stem in targets]
    return [Pair(prefix + s, inputs[s][0], targets[s][0], split) for s in common], problems


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """Group images by their path in a folder without suffix."""
    stems: dict[str, list[Path]] = {}
    for path in find_images(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        stems.setdefault(stem, []).append(path)
    return stems


def _unsupported(folder: Path) -> Iterator[Problem]:
    """Report files that are no images by name; hidden ones are nobody's business."""
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and path.is_file() and path.suffix.lower() not in EXTENSIONS:
            possible = " ".join(suffix.lstrip(".") for suffix in EXTENSIONS)
            message = f"{path} is ignored: its suffix is not one of {possible}."
            yield Problem("unsupported", message, "warning")


def _duplicate(paths: list[Path]) -> Problem:
    listed = " and ".join(str(path) for path in paths)
    return Problem("duplicate", f"{listed} differ in suffix only. Keep one of them.")


def _orphans(
    these: Mapping[str, list[Path]], others: Mapping[str, list[Path]], *, missing: Path
) -> Iterator[Problem]:
    """Report images without a partner, with the name that comes nearest to it."""
    free = [stem for stem in others if stem not in these]
    for stem in these:
        if stem not in others:
            near = get_close_matches(stem, free, n=1, cutoff=0.5)
            hint = f" Did you mean {others[near[0]][0]}? Names must be the same." if near else ""
            path = these[stem][0]
            message = f"{path} has no {missing.name}: {missing / stem}.png is missing.{hint}"
            yield Problem("orphan", message)


def _in_table(table: Path) -> tuple[list[Pair], list[Problem]]:
    """Read the pairs that a table lists, with paths relative to the table."""
    try:
        rows = list(_rows(table))
    except DataError as error:
        return [], [Problem("table", str(error))]
    problems = _unused_columns(table, [row for _, row in rows])
    pairs: dict[str, Pair] = {}
    for line, row in rows:
        faults = list(_row_faults(table, row))
        problems += [Problem(kind, f"{table} line {line}: {text}") for kind, text in faults]
        if not faults:
            name = _row_name(row["input"], taken=pairs)
            paths = table.parent / row["input"], table.parent / row["target"]
            pairs[name] = Pair(name, *paths, row.get("split") or "train")
    if not rows:
        problems.append(Problem("empty", f"{table} lists no pair. Give rows of input,target."))
    return list(pairs.values()), problems


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read (line, row) from a table.

    Raises: DataError if it is not UTF-8, CSV with the needed header, or JSON objects by line.
    """
    try:
        lines = table.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{table}: cannot be read as UTF-8 text ({error}).") from error
    if table.suffix == ".csv":
        yield from _csv_rows(table, lines)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{table} line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise DataError(f'{table} line {number}: write {{"input": ..., "target": ...}}.')
            yield number, row


def _csv_rows(table: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines, skipinitialspace=True, restkey="(beyond the header)")
    missing = [side for side in SIDES if side not in (reader.fieldnames or ())]
    if missing:
        header = ",".join(reader.fieldnames or ()) or "empty"
        absent = " and ".join(missing)
        raise DataError(f"{table}: no column {absent}. Its first line is {header!r}.")
    try:
        for row in reader:
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise DataError(f"{table} line {reader.line_num}: not CSV ({error}).") from error


def _unused_columns(table: Path, rows: list[dict[str, Any]]) -> list[Problem]:
    names = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    return [
        Problem("table", f"{table}: not used: {unknown('column', name, COLUMNS)}", "warning")
        for name in names
    ]


def _row_faults(table: Path, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Say what is wrong with one row, as (kind of problem, message)."""
    for side in SIDES:
        value = row.get(side)
        if not isinstance(value, str) or not value:
            yield "table", f"{side} is {value!r}, not a path."
        elif not (table.parent / value).is_file():
            yield "orphan", f"the {side} {value} does not exist beside the table."
    split = row.get("split") or "train"
    if split not in SPLITS:
        yield "table", unknown("split", str(split), SPLITS)


def _row_name(source: str, *, taken: Mapping[str, Pair]) -> str:
    """Name a pair by its input; a number tells those apart that share one."""
    path = PurePath(source).with_suffix("")
    is_inside = not path.is_absolute() and ".." not in path.parts
    stem = path.as_posix() if is_inside else path.name
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name


def _compare(pair: Pair, source: Pixels, target: Pixels) -> list[Problem]:
    if source.shape != target.shape:
        (height, width), (h, w) = source.shape[:2], target.shape[:2]
        message = f"{pair.source} is {width}x{height}, but {pair.target} is {w}x{h}. Make them one."
        return [Problem("size", message)]
    if np.array_equal(source, target):
        message = f"{pair.source} and its target are the same picture."
        return [Problem("identical", message, "warning")]
    return []


def _content(pixels: Pixels) -> str:
    return blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).hexdigest()


def _contradictions(contents: Mapping[Pair, tuple[str, str]]) -> Iterator[Problem]:
    """Report inputs that stand twice, with different targets."""
    first: dict[str, Pair] = {}
    for pair, (source, target) in contents.items():
        earlier = first.setdefault(source, pair)
        if contents[earlier][1] != target:
            message = f"{earlier.source} and {pair.source} are one picture with different targets."
            yield Problem("contradiction", message, "warning")


def _leaks(contents: Mapping[Pair, tuple[str, str]]) -> Iterator[Problem]:
    """Report test inputs that are also train inputs."""
    train = {source: pair for pair, (source, _) in contents.items() if pair.split == "train"}
    for pair, (source, _) in contents.items():
        if pair.split == "test" and source in train:
            message = (
                f"{pair.source} is for testing, but also for training: {train[source].source}."
            )
            yield Problem("leak", message, "warning")

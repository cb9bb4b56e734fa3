"""Reference: the file system itself, with a disk that is really full."""

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewshot_rt.errors import DataError
from fewshot_rt.files import whole, write_json, write_text

LARGE = torch.zeros(1 << 16)  # 256 KiB
NOISE = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs Linux and root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    # Lazily: a writer that failed may still hold its file open.
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_new_file_and_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text.txt"
    write_text(path, "straße")
    assert path.read_bytes() == "straße".encode()
    assert [*path.parent.iterdir()] == [path]


def test_json_reads_back(tmp_path: Path) -> None:
    values = {"name": "straße", "numbers": [1, 0.1, None, True]}
    write_json(tmp_path / "values.json", values)
    text = (tmp_path / "values.json").read_text(encoding="utf-8")
    assert json.loads(text) == values
    assert "straße" in text
    assert text.endswith("}\n")


def test_the_old_file_stands_until_the_new_one_is_done(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    write_text(path, "old")
    with whole(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ZeroDivisionError])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "text.txt"
    write_text(path, "old")

    def write_half() -> None:
        with whole(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * (1 << 17)),
    "pillow": lambda path: Image.fromarray(NOISE).save(path, "PNG"),
    "safetensors": lambda path: save_file({"a": LARGE}, path),
    "torch": lambda path: torch.save({"a": LARGE}, path),
}


@pytest.mark.parametrize("name", ["file.pt", "straße.pt"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    small_disk: Path, writer: str, name: str
) -> None:
    # A letter beyond ASCII makes torch write through Python instead of its own writer.
    path = small_disk / name
    write_text(path, "old")
    free = os.statvfs(small_disk).f_bfree
    message = rf"{name} was not written: the disk is full\. Free some space"
    with pytest.raises(DataError, match=message), whole(path) as temporary:
        WRITERS[writer](temporary)
    assert path.read_text() == "old"
    assert [*small_disk.iterdir()] == [path]
    assert os.statvfs(small_disk).f_bfree == free


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_says_it_is_full(tmp_path: Path, number: int) -> None:
    with pytest.raises(DataError, match="the disk is full"), whole(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert [*tmp_path.iterdir()] == []


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(DataError, match=r"text cannot be written: (Not a directory|File exists)"):
        write_text(tmp_path / "file" / "text", "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder cannot be written: Is a directory"):
        write_text(tmp_path / "folder", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("writer", WRITERS)
def test_files_are_as_readable_as_any_other(tmp_path: Path, writer: str) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with whole(tmp_path / "file.pt") as temporary:
        WRITERS[writer](temporary)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (plain, tmp_path / "file.pt")}
    assert len(modes) == 1

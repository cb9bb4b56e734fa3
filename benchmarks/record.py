"""One measurement as one JSON line, in one file for each date and machine; never edited by hand."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fewshot_rt.errors import DataError
from fewshot_rt.versions import versions

from .machine import describe_machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured, where, and on which code.

    kind: "latency" (times), "quality" (metrics), "start" (of processes), "learning" (one cell of
    `bench tasks`) and so on. case: what was answered. reference: the variant that parity is
    against, or the one to judge. variants: of each, its times in ms, the first call apart, or its
    metrics. parity: of each other variant, relative L2 and so on. images: in one call, or measured
    in all. floor: see `Floor`. commit: None outside of git; "+" says it was changed.
    """

    kind: str = "latency"

    case: str
    images: int
    reference: str
    variants: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, Any]
    parity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    floor: Mapping[str, float] = field(default_factory=dict)
    date: str = field(default_factory=lambda: _now())
    commit: str | None = field(default_factory=lambda: commit())
    machine: Mapping[str, Any] = field(default_factory=lambda: describe_machine().to_dict())
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return asdict(self)


def append_record(record: Record, folder: Path = RESULTS) -> Path:
    """Append a record to the file of its date and this machine; give that file.

    Raises: DataError if the folder cannot be written to.
    """
    path = folder / f"{record.date[:10]}-{describe_machine().slug}.jsonl"
    line = json.dumps(record.to_dict(), ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # At once, so that lines of processes that measure side by side do not mix.
        with path.open("ab", buffering=0) as file:
            file.write(line.encode())
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def read_records(folder: Path = RESULTS) -> list[Record]:
    """Read all records of a folder, oldest first.

    Raises: DataError if a line is not a record.
    """
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}:{number} is not a record ({error}).") from error
    return sorted(records, key=lambda record: record.date)


def commit(folder: Path = RESULTS.parent) -> str | None:
    """Give the commit of the sources, with "+" if they were changed since; None outside of git."""
    head = _git(folder, "rev-parse", "--short", "HEAD")
    if head is None:
        return None
    return f"{head}+" if _git(folder, "status", "--porcelain", "--", "..") else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

"""How long one image takes from the shell: a process that opens a bundle, answers and ends."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from fewshot_rt.errors import FewshotError

from .markdown import table
from .record import Record
from .timing import interleave, summarise

KIND = "start"
COMMAND = "from fewshot_rt.cli.main import main; main()"
NOTHING = "python alone"  # an interpreter that does nothing: what no program can go below


def bench_starts(bundles: Mapping[str, Path], image: Path, *, rounds: int = 10) -> Record:
    """Time `fewshot-rt predict IMAGE` with each bundle, in turns, and say how large each is.

    Files are in the system's cache, as they are after the first call of a day.
    Units: milliseconds; megabytes.
    Raises: FewshotError if a bundle does not answer.
    """
    with TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], None]] = {NOTHING: partial(_run, ["-c", ""])}
        for name, bundle in bundles.items():
            out = str(Path(folder) / name)
            words = ["predict", str(image), "--model", str(bundle), "--out", out, "--overwrite"]
            calls[name] = partial(_run, ["-c", COMMAND, *words])
        samples = interleave(calls, rounds=rounds, warmup=1)
        silent = [name for name in bundles if not list(Path(folder, name).glob("*.png"))]
        if silent:
            raise FewshotError(f"{silent[0]} wrote no answer to {image}.")
    variants = {name: summarise(times).to_dict() for name, times in samples.items()}
    for name, bundle in bundles.items():
        size_bytes = sum(file.stat().st_size for file in bundle.iterdir())
        variants[name]["size_mb"] = size_bytes / 1e6
    return Record(
        kind=KIND,
        case=KIND,
        images=1,
        reference=NOTHING,
        variants=variants,
        settings={"rounds": rounds},
    )


def make_start_table(record: Record) -> str:
    """Make the table of a record: a row for each bundle, and what it was measured on below."""
    rows = [
        [
            name,
            *(f"{values[key] / 1000:.2f} s" for key in ("median_ms", "p10_ms", "p90_ms")),
            f"{values['size_mb']:.1f} MB" if "size_mb" in values else "",
        ]
        for name, values in record.variants.items()
    ]
    count = int(record.variants[record.reference]["count"])
    caption = (
        f"From the shell to the answer's file, one image, {count} processes each, in turns. "
        f"{record.machine['cpu']}, {record.machine['cores']} cores; {record.date[:10]}, commit "
        f"{record.commit or 'unknown'}."
    )
    return f"{table(['way', 'median', 'p10', 'p90', 'on disk'], rows)}\n\n{caption}"


def _run(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FewshotError(f"a process that was timed failed: {done.stderr.strip()}")

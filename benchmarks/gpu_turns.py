"""Several processes that share one GPU: they compile side by side, and measure one after the other.

Compiling takes minutes of the CPU's cores and hardly any of the GPU; one after the other, a GPU
that is lent for some minutes would be spent on it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .gpu_units import Outcome
from .machine import count_cores
from .record import Record

POLL_SECONDS = 0.2
# What is compiled first, and timed; then what else is compiled.
COMPILED, TIMED = "compiled", "timed"
PHASES = (COMPILED, TIMED)


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Who measures when. folder: that all share; name: of this process; waited: whom all await.

    Compilers try kernels on the GPU now and then, even while another process measures; only
    `wait_for_others` keeps clear of that.
    """

    folder: str
    name: str
    waited: Sequence[str]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the GPU, of all processes that ask for it."""
        import fcntl  # not on Windows, where nothing else of this needs it

        with (Path(self.folder) / "gpu.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def wait_for_others(self, phase: str, until: float) -> None:
        """Say that a phase of this process is done, and wait for the others' to be.

        phase: one of `PHASES`. until: by monotonic.
        """
        _ready(Path(self.folder), self.name, phase).touch()
        while time.monotonic() < until:
            if all(_ready(Path(self.folder), name, phase).exists() for name in self.waited):
                return
            time.sleep(POLL_SECONDS)

    def report(self, outcomes: Sequence[Outcome]) -> None:
        """Leave what came of this process for the one that started it."""
        text = json.dumps([asdict(outcome) for outcome in outcomes])
        _report(Path(self.folder), self.name).write_text(text, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process does. options: of the command; is_waited: whether others await its code."""

    name: str
    options: Sequence[str]
    is_waited: bool = False


def run_shares(shares: Sequence[Share], options: Sequence[str]) -> Iterator[Outcome]:
    """Run a process of `make gpu` for each share, and yield what came of each as it ends.

    options: that all are called with.
    Raises: ValueError if two shares have one name.
    """
    if len({share.name for share in shares}) < len(shares):
        raise ValueError(f"shares need names of their own: {[share.name for share in shares]}")
    waited = [share.name for share in shares if share.is_waited]
    with tempfile.TemporaryDirectory() as kept:
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for share in shares:
                turns = Turns(folder=kept, name=share.name, waited=waited)
                command = [sys.executable, "-m", "fewshot_rt.benchmarks.gpu"]
                command += [*options, *share.options, "--share", json.dumps(asdict(turns))]
                # Their tables stay away: there will be one of all.
                running[share.name] = subprocess.Popen(
                    command, env=_environment(len(shares)), stdout=subprocess.DEVNULL
                )
            while running:
                for name in [n for n, process in running.items() if process.poll() is not None]:
                    status = running.pop(name).returncode
                    for phase in PHASES:
                        _ready(Path(kept), name, phase).touch()
                    yield from _outcomes(_report(Path(kept), name), name, status)
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def _outcomes(path: Path, name: str, status: int) -> list[Outcome]:
    if not path.exists():
        reason = f"its process ended with status {status} and no report"
        return [Outcome(case=name, record=None, reason=reason, has_failed=True)]
    found = json.loads(path.read_text(encoding="utf-8"))
    for outcome in found:
        outcome["record"] = outcome["record"] and Record(**outcome["record"])
    return [Outcome(**outcome) for outcome in found]


def _environment(count: int) -> dict[str, str]:
    """Give each of `count` processes its part of the cores, and more to compile with: it waits."""
    threads = max(1, count_cores() // count)
    own = {"TORCHINDUCTOR_COMPILE_THREADS": str(2 * threads), "OMP_NUM_THREADS": str(threads)}
    return own | dict(os.environ)


def _ready(folder: Path, name: str, phase: str) -> Path:
    return folder / f"{name}.{phase}"


def _report(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"

"""The state of a training: saved whole, read or refused, and never torn by Ctrl-C."""

import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import ModelError
from .files import whole


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state whole.

    Raises: DataError if the disk is full or the place cannot be written to.
    """
    with whole(path) as temporary:
        torch.save(dict(state), temporary)


def load_state(path: Path, take: Callable[[dict[str, Any]], None], *, mend: str) -> None:
    """Read a state, on the CPU, and let `take` go on from it. mend: what a user can do if it fails.

    Raises: ModelError if it is damaged or of other sizes.
    """
    try:
        take(torch.load(path, map_location="cpu", weights_only=True))
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise ModelError(
            f"the saved state {path} is damaged or of other sizes ({error}). {mend}"
        ) from error


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that no step is left half taken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt

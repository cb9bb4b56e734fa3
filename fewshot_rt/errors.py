"""What can go wrong, as a few exceptions that say what was given, what is possible, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class FewshotError(Exception):
    """Anything that the user of this package can mend. The CLI prints it and exits with 1."""


class ConfigError(FewshotError):
    """An option, key or value that does not exist or does not fit."""


class DataError(FewshotError):
    """Images or pairs that cannot be used as they are."""


class ModelError(FewshotError):
    """A base, adapter, run or bundle that is missing, damaged or does not fit."""


class EngineError(FewshotError):
    """An engine that cannot run here, or that failed its parity check."""


def unknown(kind: str, given: str, possible: Iterable[str]) -> str:
    """Say that a name is unknown, with the nearest possible one."""
    names = sorted(possible)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {given!r}.{hint} Possible: {', '.join(names) or 'none'}."

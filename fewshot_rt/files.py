"""Files are written whole: to a temporary name beside the target, then renamed."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import DataError

# A writer that fails beside less than this has filled the disk.
LEAST_FREE_BYTES = 1 << 20


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Lend a temporary path that takes the place of `path` when the block ends without an error.

    Raises: DataError if the disk is full or the place cannot be written to.
    """
    temporary: Path | None = None
    with reported(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-", suffix=path.suffix)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            # mkstemp and safetensors make private files; answers and weights are for all to read.
            temporary.chmod(0o666 & ~_UMASK)
            os.replace(temporary, path)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn the errors of a block that writes `path` into ones that a user can mend.

    Raises: DataError if the disk is full or the place cannot be written to.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if _is_disk_full(error, path.parent):
            raise DataError(
                f"{path} was not written: the disk is full. Free some space."
            ) from error
        if isinstance(error, OSError):
            raise DataError(f"{path} cannot be written: {error.strerror or error}.") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Raises: DataError if the disk is full or the place cannot be written to.
    """
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole.

    Raises: DataError if the disk is full or the place cannot be written to.
    """
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _is_disk_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors quotes the system's message; torch.save says only that its writer failed.
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        return True
    return folder.is_dir() and shutil.disk_usage(folder).free < LEAST_FREE_BYTES


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()

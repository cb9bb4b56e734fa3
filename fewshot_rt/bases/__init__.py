"""Families of video models, one file each; `open_base` finds the right one."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..discover import load_module, module_names
from ..errors import ModelError, unknown

if TYPE_CHECKING:
    from ..base import Base


def open_base(name: str, *, device: str = "cpu") -> "Base":
    """Open a base: the name of one in the box, or a folder that `pretrain` wrote.

    Raises: ModelError if there is no such base, if its files are damaged, or if the device is not
    there; ConfigError if there is no such kind of device.
    """
    from ..device import pick_device

    device = pick_device(device)
    if name in module_names(__name__):
        return load_module(__name__, name).open_base(name, device=device)  # type: ignore[no-any-return]
    if (Path(name) / "model_index.json").is_file():
        return load_module(__name__, "pocket").open_base(name, device=device)  # type: ignore[no-any-return]
    raise ModelError(f"{unknown('base', name, module_names(__name__))} Or give a folder of a base.")

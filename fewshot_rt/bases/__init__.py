"""Families of video models, one file each; `open_base` finds the right one."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..cards import find_card
from ..checkpoints import INDEX_FILE, find_snapshot, read_pipeline
from ..discover import load_module, module_names
from ..errors import ModelError, unknown

if TYPE_CHECKING:
    from ..base import Base

IN_THE_BOX = ("pocket",)


def open_base(
    name: str, *, device: str = "cpu", weights: str = "auto", vae: str | None = None
) -> "Base":
    """Open a base: the name of one in the box, a folder that `pretrain` wrote, a folder of a
    family's pipeline in diffusers' layout, or such a pipeline's name on the Hub, with a slash.

    weights: how a large base keeps its own: fp32, bf16, int8, nf4, or auto for what suits the
    device. vae: a file of a tiny autoencoder's weights to use in place of the base's own.
    Raises: ModelError if there is no such base, if its files are damaged, if the tiny autoencoder
    does not fit, or if the device is not there; ConfigError if there is no such kind of device.
    """
    from ..device import pick_device

    opened = _open(name, device=pick_device(device), weights=weights)
    if vae is not None:
        _use_tiny(opened, Path(vae))
    return opened


def _open(name: str, **chosen: str) -> "Base":
    if name in IN_THE_BOX:
        return load_module(__name__, name).open_base(name, **chosen)  # type: ignore[no-any-return]
    if (Path(name) / INDEX_FILE).is_file():
        return load_module(__name__, _family(Path(name))).open_base(name, **chosen)  # type: ignore[no-any-return]
    if name.count("/") == 1 and not Path(name).exists():
        folder = find_snapshot(name)
        opened: Base = load_module(__name__, _family(folder)).open_base(str(folder), **chosen)
        opened.name = name
        card = find_card(name)
        if card is not None:  # the folders of some models do not tell
            opened.geometry = replace(opened.geometry, native=card.native)
        return opened
    raise ModelError(f"{unknown('base', name, IN_THE_BOX)} Or give a folder of a base.")


def _use_tiny(base: "Base", path: Path) -> None:
    from ..pipeline_base import PipelineBase

    if not isinstance(base, PipelineBase):
        raise ModelError(f"the autoencoder of {base.name} is a tiny one already. Leave out --vae.")
    base.use_tiny(path)


def _family(folder: Path) -> str:
    """Give the module of a folder's family: pocket's own index names no pipeline.

    Raises: ModelError if the index is damaged, or the pipeline is of no family here.
    """
    try:
        pipeline = read_pipeline(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"the base in {folder} cannot be read ({error}).") from error
    if pipeline is None:
        return "pocket"
    families = {
        known: name
        for name in module_names(__name__)
        for known in load_module(__name__, name).PIPELINES
    }
    if pipeline not in families:
        raise ModelError(unknown("pipeline", pipeline, families))
    return families[pipeline]

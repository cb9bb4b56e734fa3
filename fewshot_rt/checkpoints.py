"""Folders of models in diffusers' layout, as they come from the Hub."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, ModelError, unknown

if TYPE_CHECKING:
    from torch import nn

INDEX_FILE = "model_index.json"
# What a pipeline in diffusers' layout consists of; many repositories hold all in one file, too.
PATTERNS = ("*.json", "*/*.safetensors", "*.model", "*.txt")


def find_snapshot(name: str) -> Path:
    """Give the folder of a model on the Hub, downloading what is not there yet.

    name: owner/model, or owner/model@revision for a branch, a tag or a commit.
    HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as huggingface_hub has them.
    Raises: ModelError if there is no such model or revision, it is gated, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = name.partition("@")

    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(PATTERNS))
        )
    except GatedRepoError as error:
        mend = f"accept its licence on huggingface.co/{name}, then log in: hf auth login"
        raise ModelError(f"the base {name} is gated: {mend}.") from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{name} has no revision {revision!r}. Give a branch, a tag or a commit of "
            f"huggingface.co/{name}/commits, or leave out @{revision}."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"there is no base {name!r} on the Hub that you may read, nor a folder of that name. "
            "Check the name, or log in: hf auth login."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"the base {name} is not on this machine and cannot be downloaded. Connect to the "
            f"network (HF_HUB_OFFLINE unset), or download it elsewhere (hf download {name}) and "
            "give the folder."
        ) from error


def read_pipeline(folder: Path) -> str | None:
    """Give the name of the pipeline that a folder is made for; None if it names none.

    Raises: OSError or ValueError if there is no index, or it is damaged.
    """
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    name = index.get("_class_name")
    return name if isinstance(name, str) else None


def read_network(network: "type[nn.Module]", folder: Path, *, device: str, weights: str) -> "Any":
    """Read a large network of diffusers' classes: on the CPU, unless it is of few bits.

    weights: how they are kept: "fp32", "bf16", "int8", "nf4", or "auto" for what suits the device
    on which they will be used, bf16 on cuda and fp32 on the CPU.
    Raises: OSError, ValueError or RuntimeError if files are missing or damaged; ConfigError if
    there is no such kind of weights; ModelError if it needs a package that is not installed.
    """
    import torch

    from .device import enough_memory, weight_type
    from .quantise import quantise
    from .train_config import FEW_BITS

    types = {"auto": weight_type(device), "fp32": torch.float32, "bf16": torch.bfloat16}
    types |= {kind: weight_type(device) for kind in FEW_BITS}
    if weights not in types:
        raise ConfigError(unknown("kind of weights", weights, types))
    read: Any = network
    found = read.from_pretrained(folder, torch_dtype=types[weights])
    if weights in FEW_BITS:
        quantise(found, weights)
        with enough_memory():
            found.to(device)  # rounds the weights
    return found


def digest_file(path: Path) -> str:
    """Give 12 hexadecimal digits over all of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def digest_folder(folder: Path) -> str:
    """Give 12 hexadecimal digits over what a model is: its configurations and its weights' headers.

    These are the index and the folders that it names; others may lie beside them. Weights are known
    by the first bytes and the size of each file: reading all of them would take minutes.
    """
    digest = hashlib.sha256()
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    parts = [name for name, value in index.items() if isinstance(value, list)]
    files = [path for part in parts for path in (folder / part).rglob("*")]
    for path in sorted([folder / INDEX_FILE, *files]):
        is_weights = path.suffix == ".safetensors"
        if path.is_file() and (is_weights or path.suffix == ".json"):
            with path.open("rb") as file:
                content = file.read(1 << 20) if is_weights else file.read()
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode() + content)
    return digest.hexdigest()[:12]

"""`fewshot-rt doctor`: what this machine can run, and how to get the rest."""

import os
import platform
from importlib.util import find_spec

import click

from fewshot_rt.versions import versions

from .options import json_option, write_result
from .progress import say, show_table


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Tell what this machine can run, and how to get the rest."""
    from fewshot_rt.export.engine import engine_names, fastest_engine, get_engine

    engines = {name: get_engine(name).missing() for name in engine_names()}
    ready = {name: get_engine(name) for name, missing in engines.items() if missing is None}
    able = {
        name: {"devices": list(engine.devices()), "precisions": list(engine.precisions)}
        for name, engine in ready.items()
    }
    fastest = fastest_engine("cpu")
    devices = _devices()
    show_table(["package", "version"], [[k, v] for k, v in versions().items()])
    show_table(["device", ""], [[k, v] for k, v in devices.items()])
    rows = [
        [name, *(", ".join(value) for value in values.values())] for name, values in able.items()
    ]
    show_table(["engine, ready", "devices here", "precisions"], rows)
    for name, missing in engines.items():
        if missing is not None:
            say(f"engine {name}: {missing}")
    say(f"fastest on this processor: {fastest}, which `fewshot-rt export` takes by itself")
    result = {"versions": versions(), "devices": devices, "engines": engines}
    write_result(result | {"able": able, "fastest": fastest}, as_json=as_json)


def _devices() -> dict[str, str]:
    devices = {"processor": platform.machine(), "cores": str(os.cpu_count())}
    if find_spec("torch") is None:
        return devices | {"cuda": "PyTorch is not installed"}
    import torch

    from fewshot_rt.device import has_fast_bf16

    devices["bf16 on the processor"] = "fast" if has_fast_bf16() else "slow; fp32 is used"
    devices["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return devices

"""Which versions made a file."""

import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "fewshot-rt",
    "torch",
    "diffusers",
    "peft",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "triton",
    "numpy",
)


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that decide a result."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found

"""What our TensorRT code calls, against TensorRT's own Python bindings.

TensorRT's libraries are not on the package index, its bindings are. Stand-ins for the libraries,
which do nothing, let the bindings be imported; what they say of every class, method, argument and
constant is then checked by a type checker. Nothing here has run on TensorRT.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from fewshot_rt.export.trt_plugin import NAMESPACE, PLUGINS

pytestmark = [
    pytest.mark.skipif(
        find_spec("tensorrt_bindings") is None,
        reason="no bindings are installed: pip install --no-deps tensorrt-cu13-bindings",
    ),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="stand-ins for libraries need gcc"),
]
ROOT = Path(__file__).resolve().parents[1]
FILES = ("trt_network.py", "trt_runtime.py", "trt_choice.py", "engines/trt.py")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# Every symbol that the bindings take from the libraries; each gives nothing.
STAND_IN = """
void *createInferBuilder_INTERNAL(void *log, int version) { return 0; }
void *createInferRefitter_INTERNAL(void *engine, void *log, int version) { return 0; }
void *createInferRuntime_INTERNAL(void *log, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *log, int version) { return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *log, int version) { return 0; }
void *getBuilderPluginRegistry(int capability) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void *log, char const *space) { return 1; }
"""
# As NVIDIA's own package `tensorrt` is written, which comes with the libraries.
FRONT = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
FRONT_PLUGIN = "from tensorrt_bindings.plugin import *\n"
STUBGEN = (
    "import mypy.stubgen as s;"
    "s.main(['--inspect-mode', '-q', '-m', 'tensorrt_bindings.tensorrt', '-o', '.'])"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-ins, a package `tensorrt`, and what the bindings declare."""
    folder = tmp_path_factory.mktemp("tensorrt")
    (folder / "stand_in.c").write_text(STAND_IN)
    major = version("tensorrt_cu13_bindings").partition(".")[0]
    for library in LIBRARIES:
        file = f"lib{library}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", "-o", file, f"-Wl,-soname,{file}", "stand_in.c"]
        subprocess.run(command, cwd=folder, check=True)
    for name, content in (("tensorrt", FRONT), ("tensorrt/plugin", FRONT_PLUGIN)):
        (folder / "front" / name).mkdir(parents=True, exist_ok=True)
        (folder / "front" / name / "__init__.py").write_text(content)
    python(folder, STUBGEN)
    stubs = folder / "tensorrt_bindings"
    (stubs / "tensorrt.pyi").write_text(parsable((stubs / "tensorrt.pyi").read_text()))
    (stubs / "__init__.pyi").touch()
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.pyi").write_text(
        "from tensorrt_bindings.tensorrt import *\n__version__: str\n"
    )
    return folder


def python(folder: Path, code: str) -> str:
    """Run code in a process that sees the stand-ins and the package; give what it printed."""
    paths = os.pathsep.join([str(folder / "front"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def parsable(stubs: str) -> str:
    """Mend what no Python could mean: arguments with defaults in front, a constant named bool."""
    lines = ["import builtins", *re.sub(r"(-> |: )bool\b", r"\1builtins.bool", stubs).split("\n")]
    while (place := misread(lines)) is not None:
        lines[place] = re.sub(r"\(.*$", "(self, *args, **kwargs): ...", lines[place])
    return "\n".join(lines)


def misread(lines: list[str]) -> int | None:
    """Give the number of the first line that Python cannot read."""
    try:
        ast.parse("\n".join(lines))
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    return None


def check_types(place: Path, files: list[Path]) -> list[str]:
    """List what a type checker finds wrong in files, of all packages knowing TensorRT's alone."""
    options = ["--config-file=", "--follow-imports=skip", "--ignore-missing-imports"]
    options += ["--check-untyped-defs", f"--cache-dir={place / 'cache'}"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *map(str, files)],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "errors prevented further checking" not in result.stdout, result.stdout
    assert result.stdout, result.stderr
    return [
        line
        for line in result.stdout.splitlines()
        if ": error: " in line and "tensorrt.pyi:" not in line
    ]


def test_every_call_and_constant_is_one_of_the_bindings(place: Path) -> None:
    assert check_types(place, [ROOT / "export" / file for file in FILES]) == []


# What is wrong, and what would be right.
MISTAKES = {
    "trt.BuilderFlag.REFIT_SINGLE": "trt.BuilderFlag.REFIT_INDIVIDUAL",
    "ignore_mismatches=False": "ignore_mismatch=False",
    "network.mark_weight_refittable(": "network.mark_weights_refittable(",
    "refitter.set_named_weights(name)": "refitter.set_named_weights(name, given)",
    "self.engine.device_memory_size_v3": "self.engine.device_memory_size_v2",
    "context.execute_async_v3()": (
        "context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream)"
    ),
    "trt.DataType.BFLOAT16": "trt.DataType.BF16",
}


def test_a_mistake_in_a_call_is_found(place: Path, tmp_path: Path) -> None:
    found, expected = [], 0
    for file in FILES[:2]:
        text = (ROOT / "export" / file).read_text()
        for wrong, right in MISTAKES.items():
            expected += text.count(right)
            text = text.replace(right, wrong)
        (tmp_path / file).write_text(text)
        found += check_types(place, [tmp_path / file])
    assert expected >= len(MISTAKES)
    assert len(found) >= expected, "\n".join(found)


def test_the_logger_keeps_errors_and_building_starts(place: Path) -> None:
    code = """
import json, pathlib
import tensorrt as trt
from fewshot_rt.export.trt_network import build_plan, make_log, version_here
from fewshot_rt.spec import Signature
log = make_log()
for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO"):
    log.log(getattr(trt.ILogger.Severity, severity), severity)
try:
    build_plan(pathlib.Path("none.onnx"), Signature(inputs=(), outputs=()), role="denoiser",
               refittable=(), attentions=0, cache=pathlib.Path("none.cache"))
except TypeError as error:
    reached = str(error)
print(json.dumps([log.errors, version_here(), reached]))
"""
    errors, found, reached = json.loads(python(place, code))
    assert errors == ["INTERNAL_ERROR", "ERROR"]
    assert found == [int(part) for part in version("tensorrt_cu13_bindings").split(".")[:4]]
    assert "nullptr" in reached  # there is no builder without the library


def test_a_weight_is_handed_over_where_it_lies(place: Path) -> None:
    code = """
import json
import torch
import tensorrt as trt
weight = torch.arange(6.0).view(2, 3)
half = weight.to(torch.bfloat16)
one = trt.Weights(trt.DataType.FLOAT, weight.data_ptr(), weight.numel())
two = trt.Weights(trt.DataType.BF16, half.data_ptr(), half.numel())
seen = one.numpy().__array_interface__["data"][0] == weight.data_ptr()
print(json.dumps([seen, one.size, one.nbytes, two.size, two.nbytes]))
"""
    assert json.loads(python(place, code)) == [True, 6, 24, 6, 12]


# TensorRT's own registration, validation and template of an ahead-of-time plugin, with stand-ins
# for what comes from its library: the registry, and expressions of sizes.
PLUGIN = """
import json, types
import tensorrt as trt

made = []

class Registry:
    def get_creator(self, *names):
        return None

    def register_creator(self, creator, space):
        made.append([creator.plugin_namespace, creator.name])
        return True

class Constant:
    def __init__(self, value):
        self.value = value

class Builder:
    def constant(self, value):
        return Constant(value)

    def operation(self, kind, one, other):
        assert kind == trt.DimensionOperation.SUM
        return Constant(one.value + other.value)

trt.get_plugin_registry = Registry
trt.IDimensionExpr, trt.DimsExprs = Constant, lambda count: [None] * count
from fewshot_rt.export import trt_plugin
trt_plugin.capability_here = lambda: (9, 0)
trt_plugin.register()
trt_plugin.register()

from tensorrt_bindings.plugin import _tensor
from tensorrt_bindings.plugin._lib import _TemplatePluginCreator
_tensor.SymExprImpl = lambda expression: expression._expr.value
space, name, sizes, dtype = json.loads(INPUT)
dtype = getattr(trt.DataType, dtype)
creator = _TemplatePluginCreator(name, space, {})
request = trt.QuickPluginCreationRequest.STRICT_AOT
plugin = creator.create_plugin(
    name, space, trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD, request
)
types_out = plugin.get_output_data_types([dtype] * 3, [4] * 3)
(shape_out,) = plugin.get_output_shapes(sizes[:3], [], Builder())
tensors = []
for shape in sizes:
    tensor = trt.DynamicPluginTensorDesc()
    fixed = trt.PluginTensorDesc()
    fixed.dims, fixed.type, fixed.format = trt.Dims(shape), dtype, trt.TensorFormat.LINEAR
    tensor.desc = fixed
    tensors.append(tensor)
formats = plugin.get_supported_format_combinations(tensors, 3)
plugin.set_tactic(0)
launch, extra = types.SimpleNamespace(), types.SimpleNamespace()
plugin.get_launch_params(None, tensors, 3, launch, extra, Builder())
kernel, text = plugin.get_kernel([t.desc for t in tensors[:3]], [tensors[3].desc])
print(json.dumps({
    "made": made, "types": [t == dtype for t in types_out], "shape": [e.value for e in shape_out],
    "formats": [f.type == dtype for f in formats], "launch": vars(launch), "extra": vars(extra),
    "kernel": kernel, "text": text.decode(),
}))
"""


@pytest.mark.parametrize(("name", "dtype"), list(zip(PLUGINS, ("BF16", "HALF"), strict=True)))
def test_the_plugin_passes_tensorrts_own_checks(place: Path, name: str, dtype: str) -> None:
    pytest.importorskip("triton", reason="the plugin's kernel is written in triton")
    batch, heads, length, key_length, width = 2, 3, 129, 65, 64
    swap = (0, 2, 1, 3) if PLUGINS[name] else (0, 1, 2, 3)
    sizes = [
        [(batch, heads, of, width)[axis] for axis in swap]
        for of in (length, key_length, key_length, length)
    ]
    given = json.dumps(json.dumps([NAMESPACE, name, sizes, dtype]))
    found = json.loads(python(place, PLUGIN.replace("INPUT", given)).splitlines()[-1])
    assert found["made"] == [[NAMESPACE, name] for name in PLUGINS]
    assert found["types"] == [True]
    assert found["shape"] == sizes[0]
    assert found["formats"] == [True] * 4
    launch = found["launch"]
    # Three blocks of 64 queries a head, four warps.
    assert launch["grid_x"] == 3 * batch * heads
    assert launch["block_x"] == 128
    assert 0 < launch["shared_mem"] <= 48 << 10
    assert {launch[f"{of}_{axis}"] for of in ("grid", "block") for axis in "yz"} == {1}
    # Nothing but tensors is passed, and nothing but tensors is taken.
    assert found["extra"] == {"nbSymExprs": 0}
    assert f".visible .entry {found['kernel']}(" in found["text"]
    assert found["text"].count(".param .u64") == 4
    assert str(ROOT) not in found["text"]

"""Reference: DESIGN.md's floors and STYLE.md's sizes, read from the sources themselves."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fewshot_rt import __version__
from fewshot_rt.config import read_mapping

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fewshot_rt", "kernels", "export", "cli", "benchmarks")
# What each folder may import of ours.
BELOW = {
    "kernels": {"kernels"},
    "fewshot_rt": {"fewshot_rt"},
    "export": {"export", "fewshot_rt", "kernels"},
    "benchmarks": {"benchmarks", "export", "fewshot_rt", "kernels"},
    "cli": set(FOLDERS),
}
# Optional packages, and the only files that may import them.
OPTIONAL = {
    "onnx": ("export/engines/onnx.py", "export/onnx_*.py", "export/trt_*.py"),
    "onnxscript": ("export/onnx_*.py",),
    "onnxruntime": ("export/engines/onnx.py", "export/onnx_*.py"),
    "openvino": ("export/engines/openvino.py",),
    "nncf": ("export/nncf.py",),
    "tensorrt": ("export/engines/trt.py", "export/trt_*.py"),
    "modelopt": ("export/modelopt.py",),
    "triton": ("kernels/*_triton.py",),
    "ray": ("*/ray.py",),
    "skimage": ("benchmarks/*.py",),
    "scipy": ("benchmarks/*.py",),
    "sklearn": ("benchmarks/forest.py",),
    "matplotlib": ("benchmarks/plots.py",),
}
HEAVY = {"torch", "diffusers", "transformers", "peft"} | set(OPTIONAL)
# What `predict` with a bundle needs, and what the command line loads before it knows the command.
LIGHT = (
    "fewshot_rt",
    "fewshot_rt.predict",
    "fewshot_rt.task",
    "fewshot_rt.sample",
    "fewshot_rt.transition",
    "fewshot_rt.train_config",
    "fewshot_rt.pretrain_config",
    "fewshot_rt.bases",
    "fewshot_rt.cards",
    "fewshot_rt.costs",
    "fewshot_rt.memory",
    "fewshot_rt.export.bundle",
    "fewshot_rt.export.engines.onnx",
    "fewshot_rt.benchmarks.cases",
    "fewshot_rt.benchmarks.tasks",
    "fewshot_rt.cli.main",
    "fewshot_rt.cli.bases",
    "fewshot_rt.cli.predict",
)
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
MOST_WEIGHT_BYTES = 24 << 20
PYPROJECT = read_mapping(ROOT / "pyproject.toml")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "fewshot_rt" else ["fewshot_rt", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Name all that a file imports, absolutely: "a.b.c" for "from a.b import c"."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = [*start, *filter(None, [node.module])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def floor(name: str) -> str | None:
    """Say in which of our folders an imported name lies, if in any."""
    parts = name.split(".")
    if parts[0] != "fewshot_rt":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "fewshot_rt"


def test_relative_imports_are_read_as_absolute_ones() -> None:
    assert "fewshot_rt.errors.ConfigError" in set(imports(ROOT / "fewshot_rt" / "schedule.py"))
    assert "fewshot_rt.transition.Transition" in set(imports(ROOT / "fewshot_rt/world/clips.py"))
    assert floor("fewshot_rt.export") == floor("fewshot_rt.export.engine.get_engine") == "export"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_imports_one_above_it(folder: str) -> None:
    found = {(named(p), n) for p in sources(folder) for n in imports(p)}
    assert found, folder
    too_high = {(p, n) for p, n in found if floor(n) not in BELOW[folder] | {None}}
    assert not too_high


def test_kernels_import_torch_and_triton_only() -> None:
    possible = {"torch", "triton", "fewshot_rt"} | sys.stdlib_module_names
    others = {n for path in sources("kernels") for n in imports(path)}
    assert {n for n in others if n.split(".")[0] not in possible} == set()


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_stay_in_their_files(package: str) -> None:
    users = [p for p in sources(*FOLDERS) if package in {n.split(".")[0] for n in imports(p)}]
    homes = OPTIONAL[package]
    assert [named(p) for p in users if not any(p.relative_to(ROOT).match(h) for h in homes)] == []


def test_optional_packages_are_never_needed_to_import_a_file() -> None:
    at_once = {
        (named(path), name)
        for path in sources(*FOLDERS)
        for node in tree(path).body
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in (getattr(node, "module", None), *(alias.name for alias in node.names))
        if name and name.split(".")[0] in set(OPTIONAL) - {"triton"}
    }
    assert at_once == set()


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print(*{{n.split('.')[0] for n in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) & HEAVY == set()


def test_files_are_small() -> None:
    lengths = {
        named(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*FOLDERS, "tests")
    }
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def is_triton_kernel(function: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_functions_are_short() -> None:
    long = [
        f"{named(path)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in sources(*FOLDERS, "tests")
        for node in ast.walk(tree(path))
        if isinstance(node, Function)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES
        and not is_triton_kernel(node)
    ]
    assert long == []


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """List the public functions and classes of a module, and the methods of the latter."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def test_what_is_public_has_a_docstring() -> None:
    silent = [
        f"{named(path)}: {name}"
        for path in sources(*FOLDERS)
        for name, node in public(tree(path).body)
        if not ast.get_docstring(node)
    ]
    silent += [named(path) for path in sources(*FOLDERS) if not ast.get_docstring(tree(path))]
    assert silent == []


def test_no_file_is_named_for_nothing() -> None:
    names = {part for path in sources(*FOLDERS) for part in path.relative_to(ROOT).parts}
    assert {n for n in names if n.removesuffix(".py") in ("utils", "helpers", "misc")} == set()


def test_the_version_is_said_once() -> None:
    assert PYPROJECT["project"]["version"] == __version__


def test_every_folder_of_sources_is_a_listed_package() -> None:
    folders = {path.parent for path in sources(*FOLDERS)}
    assert [named(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    setuptools = PYPROJECT["tool"]["setuptools"]
    packages = [module_name(folder / "__init__.py") for folder in folders]
    assert sorted(setuptools["packages"]) == sorted(packages)
    mapped = {"fewshot_rt" if f == "fewshot_rt" else f"fewshot_rt.{f}": f for f in FOLDERS}
    assert setuptools["package-dir"] == mapped


def test_the_shipped_weights_are_small() -> None:
    files = [path for path in (ROOT / "fewshot_rt" / "weights").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_WEIGHT_BYTES


def expected_in_wheel() -> set[str]:
    files = sources(*FOLDERS)
    files += [path for path in (ROOT / "fewshot_rt" / "weights").rglob("*") if path.is_file()]
    files += (ROOT / "fewshot_rt" / "bases" / "cards").glob("*.json")
    files.append(ROOT / "fewshot_rt" / "py.typed")
    return {
        named(path) if named(path).startswith("fewshot_rt/") else f"fewshot_rt/{named(path)}"
        for path in files
    }


@pytest.mark.slow
def test_the_wheel_holds_all_packages_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="building a wheel needs the package 'build'")
    pytest.importorskip("setuptools", reason="building without isolation needs setuptools")
    # A copy: building leaves files beside the sources.
    tree_copy = tmp_path / "sources"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree_copy / folder, ignore=ignore)
    for path in (path for path in ROOT.iterdir() if path.suffix in (".toml", ".md")):
        shutil.copy(path, tree_copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    result = subprocess.run(
        [*command, "--outdir", str(tmp_path / "wheel"), str(tree_copy)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    assert f"-{__version__}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
        entry_points = next(name for name in metadata if name.endswith("entry_points.txt"))
        assert "fewshot-rt = fewshot_rt.cli.main:main" in archive.read(entry_points).decode()
    assert names - metadata == expected_in_wheel()

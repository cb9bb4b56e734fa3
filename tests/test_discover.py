"""Reference: a package made on the spot, whose modules say when they are imported."""

import sys
from pathlib import Path

import pytest

from fewshot_rt.discover import load_module, module_names
from fewshot_rt.errors import ConfigError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "zoo_for_tests"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "apes.py").write_text("NAME = 'apes'\n")
    (folder / "bees.py").write_text("raise RuntimeError('a sibling was imported')\n")
    (folder / "_hidden.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder.name


def test_names_are_listed_without_importing(package: str) -> None:
    assert module_names(package) == ("apes", "bees")
    assert f"{package}.apes" not in sys.modules


def test_one_module_is_loaded_alone(package: str) -> None:
    assert load_module(package, "apes").NAME == "apes"
    assert f"{package}.bees" not in sys.modules


def test_an_unknown_name_gets_the_nearest(package: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown animal 'ape'\. Did you mean 'apes'"):
        load_module(package, "ape", kind="animal")


@pytest.mark.parametrize("name", ["no_such_package_here", "json.decoder"])
def test_what_is_no_package(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a package"):
        module_names(name)

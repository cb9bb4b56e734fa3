"""References: a small class of settings of every kind, and files written by hand."""

import json
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest

from fewshot_rt.config import OptionInfo, make, option, options, read, to_dict
from fewshot_rt.errors import ConfigError
from fewshot_rt.pretrain_config import PretrainConfig
from fewshot_rt.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    rate: float = option(0.1, "how fast")
    steps: int = option(3, "how often")
    minutes: float | None = option(None, "how long at most")
    shots: int | None = option(4, "how many")
    name: str = option("soup", "what", choices=("soup", "salad"))
    is_hot: bool = option(True, "whether it is cooked")


def test_options_tell_what_a_flag_needs() -> None:
    found = {info.name: info for info in options(Kitchen)}
    assert list(found) == ["rate", "steps", "minutes", "shots", "name", "is_hot"]
    assert found["rate"] == OptionInfo("rate", float, 0.1, "how fast", (), False)
    assert found["minutes"] == OptionInfo("minutes", float, None, "how long at most", (), True)
    assert found["shots"] == OptionInfo("shots", int, 4, "how many", (), True)
    assert found["name"].choices == ("soup", "salad")
    assert found["is_hot"].type is bool


def test_defaults_and_given_values() -> None:
    assert make(Kitchen, {}) == Kitchen()
    made = make(Kitchen, {"steps": 9, "name": "salad", "is_hot": False})
    assert made == Kitchen(steps=9, name="salad", is_hot=False)
    with pytest.raises(FrozenInstanceError):
        made.steps = 1  # type: ignore[misc]


def test_none_only_where_it_is_possible() -> None:
    assert make(Kitchen, {"shots": None}).shots is None
    with pytest.raises(ConfigError, match="steps must be int, not None"):
        make(Kitchen, {"steps": None})


def test_a_whole_number_is_a_real_one() -> None:
    made = make(Kitchen, {"rate": 1, "minutes": 2})
    assert (made.rate, made.minutes) == (1.0, 2.0)
    assert isinstance(made.rate, float)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", 1.5, "steps must be int, not 1.5"),
        ("steps", True, "steps must be int, not True"),
        ("rate", "0.1", "rate must be float, not '0.1'"),
        ("rate", True, "rate must be float, not True"),
        ("is_hot", 1, "is_hot must be bool, not 1"),
        ("name", "sald", "unknown name 'sald'. Did you mean 'salad'.*Possible: salad, soup"),
        ("stpes", 3, "unknown setting 'stpes'. Did you mean 'steps'.*Possible: is_hot, minutes"),
    ],
)
def test_what_does_not_fit_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(Kitchen, {key: value})


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    expected = Kitchen(rate=0.5, steps=7, minutes=1.5, name="salad")
    toml, plain = tmp_path / "kitchen.toml", tmp_path / "kitchen.json"
    toml.write_text('rate = 0.5\nsteps = 7\nminutes = 1.5\nname = "salad"\n')
    plain.write_text(json.dumps(to_dict(expected)))
    assert read(Kitchen, toml) == read(Kitchen, plain) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.toml", b"rate = "), ("a.json", b"{"), ("a.toml", b"\xff\xfe"), ("a.toml", None)],
)
def test_damaged_and_missing_files(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read"):
        read(Kitchen, tmp_path / name)


def test_a_list_holds_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold settings by name, not list"):
        read(Kitchen, path)


@pytest.mark.parametrize("cls", [TrainConfig, PretrainConfig])
def test_the_settings_of_the_commands_explain_themselves_and_survive_json(cls: type) -> None:
    assert all(info.help for info in options(cls))
    values = json.loads(json.dumps(to_dict(cls())))
    assert make(cls, values) == cls()

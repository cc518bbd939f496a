"""Rewards are found by name, entry point, module and file; what cannot be found or imported says why."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from rewards import loading
from rewards.api import RewardInput
from rewards.loading import BUILTIN_REWARDS, absolute_name, list_rewards, load_reward
from rl.errors import ConfigError, RewardError

SAMPLE = RewardInput(prompt="", response="yes", answer="yes", ground_truth="yes")


def write_plugin(folder: Path, text: str, name: str = "plugin.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_by_registered_name_with_options() -> None:
    reward = load_reward("exact", {"ignore_case": False})
    assert reward.call(SAMPLE).reward == 1.0
    assert reward.validate_ground_truth is not None


def test_by_file_with_a_module_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plugin(tmp_path, "VALUE = 3.0\n", "value_beside_it.py")
    path = write_plugin(tmp_path, "import value_beside_it\n\ndef reward(sample):\n    return value_beside_it.VALUE\n")
    assert load_reward(f"{path}:reward").call(SAMPLE) == 3.0
    monkeypatch.chdir(tmp_path)
    assert load_reward("plugin.py:reward").call(SAMPLE) == 3.0
    assert absolute_name("plugin.py:reward") == f"{path}:reward"
    assert absolute_name("math") == "math"
    assert absolute_name("package.module:reward") == "package.module:reward"


def test_by_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward_package").mkdir()
    write_plugin(
        tmp_path / "my_reward_package",
        "class Mine:\n    def __init__(self, scale: float = 1.0):\n"
        "        self.scale = scale\n    def __call__(self, sample):\n        return self.scale\n",
        "rewards.py",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load_reward("my_reward_package.rewards:Mine", {"scale": 2}).call(SAMPLE) == 2.0


def test_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plugin(
        tmp_path, "def reward(sample):\n    '''Half a point for everyone.'''\n    return 0.5\n", "installed_plugin.py"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("half", "installed_plugin:reward", loading.ENTRY_POINT_GROUP)
    broken = EntryPoint("broken", "no_such_plugin:reward", loading.ENTRY_POINT_GROUP)
    monkeypatch.setattr(loading, "_entry_points", lambda: {"half": point, "broken": broken})
    assert load_reward("half").call(SAMPLE) == 0.5
    listed = {listing.name: listing for listing in list_rewards()}
    assert listed["half"].summary == "Half a point for everyone."
    assert "No module named 'no_such_plugin'" in listed["broken"].error
    assert set(BUILTIN_REWARDS) <= set(listed)


@pytest.mark.parametrize("name", sorted(BUILTIN_REWARDS))
def test_every_built_in_is_listed_with_a_summary(name: str) -> None:
    [listing] = [one for one in list_rewards() if one.name == name]
    assert (listing.source, listing.error) == ("built in", "")
    assert listing.summary


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", r"there is no reward 'exakt'; did you mean exact\? known: choice, code, exact"),
        ("no/such/file.py:reward", r"there is no file .*/no/such/file.py on "),
        ("plugin.py", r"names a file but no function in it; write plugin.py:FUNCTION"),
        (
            "no_such_package:reward",
            r"importing no_such_package failed: ModuleNotFoundError.*; it is neither installed nor in .*: a file is",
        ),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(name)


def test_broken_files_say_where(tmp_path: Path) -> None:
    broken = write_plugin(
        tmp_path, "def reward(sample):\n    return 1.0\n\nraise RuntimeError('not today')\n", "broken.py"
    )
    with pytest.raises(RewardError, match=r"RuntimeError: not today \(broken.py:4 in <module>\)"):
        load_reward(f"{broken}:reward")
    fine = write_plugin(tmp_path, "def reward(sample):\n    return 1.0\n")
    with pytest.raises(RewardError, match=r"has no 'rewrad'; it defines reward"):
        load_reward(f"{fine}:rewrad")


def test_a_class_that_refuses_its_options_is_a_config_error(tmp_path: Path) -> None:
    path = write_plugin(
        tmp_path,
        "class Mine:\n    def __init__(self, share=0.5):\n        if share > 1:\n"
        "            raise ValueError('share is above 1')\n    def __call__(self, sample):\n        return 1.0\n",
    )
    with pytest.raises(ConfigError, match=r"does not accept its options .*: share is above 1"):
        load_reward(f"{path}:Mine", {"share": 2})
    with pytest.raises(ConfigError, match=r"does not take the option 'shares'; did you mean share\?"):
        load_reward(f"{path}:Mine", {"shares": 2})

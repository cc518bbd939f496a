"""A new loss and a new estimator from a file outside the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from algorithm_batches import advantage_batch, loss_and_gradient, loss_batch

from rl.advantages import advantage_spec
from rl.errors import ConfigError
from rl.losses import policy_loss_spec
from rl.losses.contract import check_policy_loss
from rl.plugins import load_plugins

DOCS = Path(__file__).parents[3] / "docs" / "adding-an-algorithm.md"


def example_of_the_docs() -> str:
    return DOCS.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def test_algorithm_from_a_file_outside_the_package(tmp_path: Path) -> None:
    """The page's own example, word for word."""
    plugin = tmp_path / "my_algorithm.py"
    plugin.write_text(example_of_the_docs(), encoding="utf-8")
    load_plugins([str(plugin)])
    load_plugins([str(plugin)])  # a second time does nothing
    spec = policy_loss_spec("power_weighted")
    check_policy_loss(spec, {"power": 0.5}, None, accumulates=True)
    batch = loss_batch(0)
    loss, gradient = loss_and_gradient(spec, batch, "token_mean", power=1.0)
    expected = -((batch.logprobs - batch.old_logprobs).exp() * batch.advantages)[batch.loss_mask].mean()
    assert loss.item() == pytest.approx(expected.item())
    assert gradient.abs().sum() > 0
    inputs = advantage_batch(0)
    rows = advantage_spec("median_baseline").function(inputs)
    group = inputs.group_ids == inputs.group_ids[0]
    expected_row = inputs.rewards[0] - inputs.rewards[group].median()
    assert torch.allclose(rows.advantages[0], expected_row.expand(len(rows.advantages[0])))


def test_two_files_of_the_same_name_do_not_collide(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        text = (
            "from rl.advantages.api import register_advantage, Advantages, spread\n"
            f"@register_advantage('from_{folder}')\n"
            "def estimator(inputs):\n    return Advantages(spread(inputs.rewards, inputs.lengths))\n"
        )
        (tmp_path / folder / "same.py").write_text(text, encoding="utf-8")
    load_plugins([str(tmp_path / "a" / "same.py"), str(tmp_path / "b" / "same.py")])
    assert advantage_spec("from_a").function is not advantage_spec("from_b").function


def test_a_plugin_finds_the_files_beside_it_and_modules_of_the_working_directory(tmp_path, monkeypatch) -> None:
    """As rewards do: the command's own folder, not the working directory, is on its path."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(Path.cwd()))])
    (tmp_path / "beside_it.py").write_text("name = 'needs_another'\n", encoding="utf-8")
    (tmp_path / "a_module_here.py").write_text("", encoding="utf-8")
    (tmp_path / "needs.py").write_text(
        "from beside_it import name\n"
        "from rl.advantages.api import register_advantage\n"
        "@register_advantage(name)\n"
        "def estimator(inputs): ...\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    load_plugins(["needs.py", "a_module_here"])
    assert advantage_spec("needs_another") and "a_module_here" in sys.modules


def test_plugin_errors_say_which_and_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*missing\.py"):
        load_plugins([str(tmp_path / "missing.py")])
    with pytest.raises(ConfigError, match=r"'no_such_module' cannot be imported: ModuleNotFoundError"):
        load_plugins(["no_such_module"])
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('half done')\n", encoding="utf-8")
    for _ in range(2):  # a failed import is not remembered as done
        with pytest.raises(ConfigError, match="RuntimeError: half done"):
            load_plugins([str(broken)])
    clash = tmp_path / "clash.py"
    clash.write_text(
        "from rl.losses.api import register_policy_loss\n@register_policy_loss('ppo_clip')\ndef f(inputs): ...\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="'ppo_clip' is registered twice"):
        load_plugins([str(clash)])

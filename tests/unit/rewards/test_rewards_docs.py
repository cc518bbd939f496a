"""The pages on rewards: every reward has one, and the examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rewards.api import RewardInput
from rewards.loading import BUILTIN_REWARDS
from rewards.local import LocalScorer
from rl.config import RewardConfig

PAGES = Path(__file__).parents[3] / "docs" / "rewards"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("name", sorted(BUILTIN_REWARDS))
def test_every_reward_has_a_page_that_says_how_it_is_hacked(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text().casefold()
    assert text.startswith("# ")
    assert "hack" in text and "guard" in text
    assert f"]({name}.md)" in (PAGES / "README.md").read_text()


def test_the_plugin_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plugin, test = blocks("writing-a-reward.md", "python")
    Path("politeness.py").write_text(plugin)
    exec(test, {})
    [config] = blocks("writing-a-reward.md", "yaml")
    reward = RewardConfig.model_validate(yaml.safe_load(config)["reward"])
    with LocalScorer(reward.model_copy(update={"functions": reward.functions[1:]})) as scorer:
        [score] = scorer.score([RewardInput(prompt="", response="Thank you!", answer="", ground_truth=None)])
    assert list(score.breakdown) == ["politeness"]


def test_the_configs_of_the_pages_load() -> None:
    [combined] = blocks("README.md", "yaml")
    RewardConfig.model_validate(yaml.safe_load(combined)["reward"])
    [judge] = blocks("judge.md", "yaml")
    RewardConfig.model_validate({"functions": yaml.safe_load(judge)})

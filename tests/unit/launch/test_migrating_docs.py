"""The translated recipes of docs/migrating.md are configurations."""

import re
from pathlib import Path

import pytest

from launch.preflight import check_algorithm
from rl.config import TrainConfig
from rl.config.loading import load_config

PAGE = (Path(__file__).parents[3] / "docs" / "migrating.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("recipe", RECIPES, ids=["verl", "trl", "openrlhf"])
def test_a_translated_recipe_is_valid(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    check_algorithm(load_config(tmp_path / "recipe.yaml", [], TrainConfig))

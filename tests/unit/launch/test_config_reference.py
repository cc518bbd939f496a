"""The page of all keys is the schema's, and says something of each."""

import re
from pathlib import Path

from launch.config_reference import reference

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == reference(), "the schema changed: run `make reference`"


def test_every_key_is_there_once_and_described():
    for_training, for_sft = reference().partition("## Keys of")[0].split("## `fledge sft`")
    for part, some in (
        (for_training, {"seed", "model.path", "critic.optimizer.lr", "reward.functions[].weight", "data.eval[].path"}),
        (for_sft, {"batch_size", "data.response_field", "data.train.path"}),
    ):
        rows = [row for row in part.splitlines() if re.match(r"\| (\*\*)?`", row)]
        keys = [row.split("`")[1] for row in rows]
        assert some < set(keys) and len(keys) == len(set(keys))
        undescribed = [row for row in rows if re.split(r"(?<!\\)\|", row)[4].strip() in ("", "None")]
        assert not undescribed

"""What the composition root builds from the sections on data shaping."""

from launch.compose import shape_data
from rl.batch import Prompt
from rl.config import TrainConfig
from rl.prompts import CurriculumSource, PromptSource

PROMPTS = tuple(Prompt(f"train:{i}", (i,), f"question {i}") for i in range(3))


def config(**sections) -> TrainConfig:
    minimal = {"model": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}, "rollout": {"prompts_per_step": 4}}
    return TrainConfig.model_validate(
        {key: {**minimal.get(key, {}), **sections.get(key, {})} for key in minimal | sections}
    )


def test_without_its_sections_nothing_is_shaped():
    source, new_groups = shape_data(config(), PROMPTS)
    groups = new_groups()
    assert type(source) is PromptSource
    assert groups.missing == 4
    assert groups.dynamic_sampling is groups.reject_degenerate is groups.curriculum is None


def test_every_section_reaches_its_part_and_the_curriculum_is_shared():
    shaped = config(
        algorithm={"dynamic_sampling": {"max_rounds": 3}},
        data={"curriculum": {"floor": 0.2}},
        rollout={"reject_degenerate": {"min_tokens": 64}},
    )
    source, new_groups = shape_data(shaped, PROMPTS)
    groups = new_groups()
    assert groups is not new_groups()
    assert groups.dynamic_sampling.max_rounds == 3
    assert groups.reject_degenerate.min_tokens == 64
    assert type(source) is CurriculumSource
    groups.curriculum.rates["train:0"] = 0.5
    assert source.state_dict()["pass_rates"] == {"train:0": 0.5}
    assert new_groups().curriculum.weight("train:0") == 1.0
    assert groups.curriculum.config.floor == 0.2

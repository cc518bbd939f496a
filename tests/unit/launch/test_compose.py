"""What the composition root builds from the sections on data shaping."""

import json
import shutil

import pytest

from launch.compose import checkpoint_store, learner_spec, shape_data
from launch.data import checked_training, load_data
from launch.tiny_models import build_tiny_model
from rl.batch import Prompt
from rl.config import TrainConfig
from rl.errors import CheckpointError, ConfigError
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


def test_learners_get_the_runs_steps_and_the_rollouts_length_and_temperature():
    settings = config(
        learner={"epochs": 2, "mini_batches": 4},
        rollout={"max_response_tokens": 7, "temperature": 0.7, "tensor_parallel_size": 2},
        algorithm={"advantage": "gae"},
        critic={"warmup_steps": 1},
    ).model_copy(update={"total_steps": 5, "seed": 3})
    spec = learner_spec(settings, "cpu", "shm")
    assert (spec.total_optimizer_steps, spec.fixed_length, spec.temperature, spec.seed) == (40, 7, 0.7, 3)
    assert spec.critic is settings.critic
    assert (spec.sync.transport, spec.sync.tensor_parallel_size) == ("shm", 2)


@pytest.mark.parametrize(
    ("setting", "before", "after"),
    [("warmup_steps", 1, 2), ("optimizer", {"name": "adamw"}, {"name": "sgd"})],
)
def test_settings_that_the_checkpoint_was_made_with_may_not_change(tmp_path, setting, before, after):
    """The policy's schedule ends `warmup_steps` later than the critic's; with more of them its last steps would have a
    learning rate of 0."""

    def store(value):
        settings = config(critic={setting: value}, algorithm={"advantage": "gae"}, checkpoint={"every": 1})
        return checkpoint_store(settings, tmp_path)

    store(before).save(1, {}, lambda directory: (directory / "shard").touch())
    assert store(before).resume() is not None
    with pytest.raises(CheckpointError, match=rf"another configuration: critic\.{setting}"):
        store(after).resume()


def test_files_that_have_only_moved_do_not_keep_a_run_from_resuming(tmp_path):
    def store(folder):
        settings = config(
            model={"path": str(folder / "model")},
            data={"train": {"path": str(folder / "rows.jsonl")}},
            critic={"path": str(folder / "critic")},
            algorithm={"advantage": "gae"},
        )
        return checkpoint_store(settings, tmp_path)

    old, new = tmp_path / "job_1", tmp_path / "job_2"
    for name in ("model", "critic"):
        (old / name).mkdir(parents=True)
        (old / name / "config.json").write_text("{}")
        (old / name / "model.safetensors").write_text("weights")
    (old / "rows.jsonl").write_text("")
    store(old).save(1, {}, lambda directory: (directory / "shard").touch())
    shutil.copytree(old, new)
    shutil.rmtree(old)
    resumed = store(new).resume()
    assert [change.split()[0] for change in resumed.changed] == ["model.path", "data.train.path", "critic.path"]
    for file, key in (("model/config.json", "model.path"), ("critic/model.safetensors", "critic.path")):
        before = (new / file).read_text()
        (new / file).write_text("other")
        with pytest.raises(CheckpointError, match=rf"another configuration: {key} /.*job_1.* -> /.*job_2[^,]*;"):
            store(new).resume()
        (new / file).write_text(before)
    (new / "rows.jsonl").rename(new / "others.jsonl")
    with pytest.raises(CheckpointError, match=r"another configuration: data.train.path /.*job_1/rows.jsonl -> "):
        store(new).resume()


class Messages(list):
    def message(self, text):
        self.append(text)

    def now(self, text): ...

    def step(self, step, metrics): ...


def test_prompts_of_the_evaluation_are_not_trained_on(tmp_path):
    def rows(name, numbers):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"prompt": f"{i}+1", "ground_truth": str(i + 1)}) + "\n" for i in numbers))
        return str(path)

    build_tiny_model("qwen3", tmp_path)
    model = {"path": str(tmp_path)}
    data = {"train": {"path": rows("train.jsonl", range(8))}, "eval": [{"path": rows("test.jsonl", [3, 5, 9])}]}
    said = Messages()
    prompts, (held_out,) = load_data(config(model=model, data=data), said)
    assert [p.text for p in prompts] == [f"{i}+1" for i in (0, 1, 2, 4, 6, 7)]
    assert [p.text for p in held_out.prompts] == ["3+1", "5+1", "9+1"]
    assert "2 prompts dropped because they are also in data.eval" in said[-1]
    prompts, _ = load_data(config(model=model, data=data | {"train_on_eval_prompts": True}), said)
    assert len(prompts) == 8
    with pytest.raises(
        ConfigError, match=r"all 8 prompts of data.train are also in data.eval.*data.train_on_eval_prompts=true"
    ):
        load_data(config(model=model, data=data | {"eval": [{**data["train"], "name": "same"}]}), said)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (1e-9, 1), (2.5, 9), (0.4 / 7, 1), (4.4 / 7 * 10, 22)])
def test_epochs_become_the_steps_that_draw_every_prompt_so_often(tmp_path, epochs, steps):
    build_tiny_model("qwen3", tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1", "ground_truth": str(i + 1)}) + "\n" for i in range(14)))
    sections = {
        "model": {"path": str(tmp_path), "dtype": "float32"},
        "data": {"train": {"path": str(rows)}},
        "reward": {"functions": [{"name": "exact"}]},
    }
    asked = config(**sections).model_copy(update={"total_epochs": epochs})
    found = checked_training(asked, Messages()).config
    assert (found.total_steps, found.total_epochs) == (steps, None)


def test_what_epochs_make_impossible_is_found_once_they_are_known(tmp_path):
    build_tiny_model("qwen3", tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1", "ground_truth": "2"}\n')
    critic = config(
        model={"path": str(tmp_path), "dtype": "float32"},
        data={"train": {"path": str(rows)}},
        algorithm={"advantage": "gae"},
        critic={"warmup_steps": 3},
    )
    with pytest.raises(ConfigError, match=r"total_epochs 2 \(= 1 steps\): critic.warmup_steps 3 leaves none"):
        checked_training(critic.model_copy(update={"total_epochs": 2}), Messages())

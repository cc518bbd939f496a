"""Every source and row format, and what each broken row says."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from launch.tiny_models import build_tokenizer
from rewards.api import GroundTruthError
from rewards.loading import load_reward
from rl.batch import Prompt
from rl.config import DatasetConfig, EvalDatasetConfig
from rl.errors import ConfigError, DataError
from rl.prompts import PromptSet, load_prompts
from rl.prompts.rows import dataset_name
from rl.prompts.source import fingerprint


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer("qwen3")


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path | str | list[Path], tokenizer: Any, max_prompt_tokens: int = 500, **settings: Any) -> PromptSet:
    several = [str(item) for item in path] if isinstance(path, list) else str(path)
    return load_set(DatasetConfig(path=several, **settings), tokenizer, max_prompt_tokens)


def load_set(config: DatasetConfig, tokenizer: Any, max_prompt_tokens: int = 500) -> PromptSet:
    return load_prompts(config, tokenizer, max_prompt_tokens=max_prompt_tokens, chat_template_options={})


def rendered(prompt: Prompt, tokenizer: Any) -> str:
    return tokenizer.decode(list(prompt.token_ids))


VERL_ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6*7?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 0},
}


def test_pictures_are_left_out(tmp_path, tokenizer):
    import datasets
    import PIL.Image

    pixels = PIL.Image.new("RGB", (2, 2))
    rows = {"prompt": ["a", "b"], "ground_truth": ["1", "2"], "image": [pixels] * 2, "views": [[pixels]] * 2}
    rows["meta"] = [{"level": 3, "icon": pixels}] * 2
    rows["talk"] = [[{"role": "user", "picture": None}], [{"role": "user", "picture": pixels}]]
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "ground_truth": datasets.Value("string"),
            "image": datasets.Image(),
            "views": datasets.List(datasets.Image()),
            "meta": {"level": datasets.Value("int64"), "icon": datasets.Image()},
            "talk": datasets.List({"role": datasets.Value("string"), "picture": datasets.Image()}),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "pictures"))
    first, again = (load(tmp_path / "pictures", tokenizer).prompts for _ in range(2))
    assert [prompt.ground_truth for prompt in first] == ["1", "2"]
    assert first[0].extra == {"talk": [{"role": "user"}]}
    assert isinstance(first[1].extra["talk"][0]["picture"]["bytes"], bytes)
    assert fingerprint(first) == fingerprint(again), "or the run could not be resumed"


def test_jsonl_rows_become_prompts(tmp_path, tokenizer):
    path = write_jsonl(
        tmp_path / "sums.jsonl",
        {"prompt": "1+1?", "ground_truth": "2", "level": 3},
        "",  # empty lines are skipped, and do not count as rows
        {
            "prompt": [{"role": "user", "content": "あ?"}],
            "ground_truth": {"any": ["json"]},
            "reward": "exact",
            "data_source": "kana",
        },
    )
    result = load(path, tokenizer, reward="math")
    assert (result.name, result.num_dropped_too_long) == ("sums", 0)
    first, second = result.prompts
    assert rendered(first, tokenizer) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert first == Prompt("sums:0", first.token_ids, "1+1?", "2", "", "math", {"level": 3})
    assert second == Prompt("sums:1", second.token_ids, "あ?", {"any": ["json"]}, "kana", "exact", {})
    assert pickle.loads(pickle.dumps(result)) == result


def test_system_prompt_and_suffix(tmp_path, tokenizer):
    path = write_jsonl(
        tmp_path / "a.jsonl", {"prompt": "1+1?", "ground_truth": "2"}, {**VERL_ROW, "ground_truth": "42"}
    )
    first, second = load(path, tokenizer, system_prompt="Think.", prompt_suffix=" Box it.", name="mixed").prompts
    assert rendered(first, tokenizer).startswith(
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1+1? Box it.<|im_end|>"
    )
    assert first.text == "1+1? Box it."
    assert rendered(second, tokenizer).startswith("<|im_start|>system\nBe brief.<|im_end|>")  # the row's own wins
    assert second.prompt_id == "mixed:1"


def test_verl_rows_from_parquet(tmp_path, tokenizer):
    path = tmp_path / "verl.parquet"
    pq.write_table(pa.Table.from_pylist([VERL_ROW]), path)
    (prompt,) = load(path, tokenizer).prompts
    assert (prompt.ground_truth, prompt.data_source, prompt.text) == ("42", "openai/gsm8k", "What is 6*7?")
    assert prompt.extra == {
        "ability": "math",
        "reward_model": {"style": "rule"},
        "extra_info": {"split": "train", "index": 0},
    }


def test_columns_that_only_some_messages_have_do_not_reach_the_template(tmp_path, tokenizer):
    rows = [
        {
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes?", "thinking": "hm"},
                {"role": "user", "content": "1+1?"},
            ],
            "ground_truth": "2",
        }
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{{ '+' if 'thinking' in m else '-' }}{% endfor %}"
    assert rendered(load(path, tokenizer).prompts[0], tokenizer) == "user-assistant+user-"


def test_arguments_that_only_some_calls_have_do_not_reach_the_template(tmp_path, tokenizer):
    """A Parquet column has one type: the arguments of all calls, merged, with nulls where a call has none."""

    def row(arguments):
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        messages = [{"role": "user", "content": "?"}, call, {"role": "tool", "content": "2"}]
        return {"prompt": messages, "ground_truth": "2", "tests": arguments}

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row({"city": "Paris"}), row({"expression": "1+1"})]), path)
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = "{% for c in messages[1].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    prompts = load(path, tokenizer).prompts
    assert [rendered(p, tokenizer) for p in prompts] == ['{"city": "Paris"}', '{"expression": "1+1"}']
    assert prompts[0].extra["tests"] == {"city": "Paris", "expression": None}, "other columns are as they are"


def test_a_turn_that_only_calls_a_tool_needs_no_text(tmp_path, tokenizer):
    prompt = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "ground_truth": "2"}))
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %};{% endfor %}"
    )
    assert rendered(load(path, tokenizer).prompts[0], tokenizer) == "user:1+1?;assistant:add;tool:2;"


@pytest.mark.parametrize("saved", ["save_to_disk", "save_to_disk_splits", "data_files"])
def test_dataset_folders(tmp_path, tokenizer, saved, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    rows = datasets.Dataset.from_list(
        [{"prompt": "1+1?", "ground_truth": "2"}, {"prompt": "1+2?", "ground_truth": "3"}]
    )
    if saved == "save_to_disk":
        rows.save_to_disk(folder)
    elif saved == "save_to_disk_splits":
        datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(folder)
    else:
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", *rows)
        write_jsonl(folder / "test.jsonl", rows[1])
    assert [p.ground_truth for p in load(folder, tokenizer, size=1).prompts] == ["2"]
    if saved == "save_to_disk":
        with pytest.raises(DataError, match="saved without splits, but split is 'test'"):
            load(folder, tokenizer, split="test")
        assert len(load_set(EvalDatasetConfig(path=str(folder)), tokenizer).prompts) == 2
        split = datasets.Dataset.from_list(list(rows), split="train")
        split.save_to_disk(tmp_path / "of_train")
        with pytest.raises(DataError, match=r"but split is 'test'; leave split out \(it was train\)"):
            load(tmp_path / "of_train", tokenizer, split="test")
        return
    assert [p.ground_truth for p in load(folder, tokenizer, split="test").prompts] == ["3"]
    with pytest.raises(DataError, match=r"(?i)split ['\"]tset['\"].*train.*test"):
        load(folder, tokenizer, split="tset")
    with pytest.raises(DataError, match="has the splits train, test; set split to one of them"):
        load_set(EvalDatasetConfig(path=str(folder)), tokenizer)
    if saved == "data_files":
        (folder / "test.jsonl").unlink()
        assert len(load_set(EvalDatasetConfig(path=str(folder)), tokenizer).prompts) == 2


def test_several_sources_are_one_dataset_in_their_order(tmp_path, tokenizer):
    """verl's train_files: [gsm8k/train.parquet, math/train.parquet]."""
    (tmp_path / "a").mkdir()
    first = write_jsonl(tmp_path / "a" / "train.jsonl", *({"prompt": f"{i}?", "ground_truth": "1"} for i in (1, 2, 3)))
    second = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([VERL_ROW, {**VERL_ROW, "data_source": "math"}]), second)
    third = write_jsonl(tmp_path / "more.jsonl", {"prompt": "2?", "ground_truth": "1"})
    result = load([first, second, third], tokenizer)
    assert result.name == "train+more"
    assert [p.prompt_id for p in result.prompts] == [f"train+more:{i}" for i in range(6)]
    assert [p.data_source for p in result.prompts] == ["", "", "", "openai/gsm8k", "math", ""]
    assert [p.prompt_id for p in load([first, second], tokenizer, size=4, name="x").prompts][-1] == "x:3"
    shards = [f"train-{i:05d}-of-00020.parquet" for i in range(20)]
    assert dataset_name(DatasetConfig(path=shards)) == "train-00000-of-00020+19", "it becomes part of file names"
    config = DatasetConfig(path=[str(first), str(third)])
    once = load_prompts(config, tokenizer, max_prompt_tokens=99, chat_template_options={}, drop_repeated=True)
    assert (len(once.prompts), once.num_repeated) == (3, 1)
    with pytest.raises(DataError, match=r"dataset .*gone\.jsonl does not exist"):
        load([first, tmp_path / "gone.jsonl"], tokenizer)
    write_jsonl(third, {"prompt": "2?"})
    with pytest.raises(DataError, match=r"more\.jsonl:1: no field 'ground_truth'"):
        load([first, third], tokenizer)


def test_a_folder_without_data_is_named(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"dataset folder .*empty: cannot load it"):
        load(tmp_path / "empty", tokenizer)


def test_repeated_rows_are_dropped_where_that_is_asked_for(tmp_path, tokenizer):
    again = {**VERL_ROW, "extra_info": {"split": "train", "index": 1}}
    other_truth = {**VERL_ROW, "reward_model": {"style": "rule", "ground_truth": "43"}}
    path = write_jsonl(tmp_path / "verl.jsonl", VERL_ROW, again, other_truth, VERL_ROW)
    assert len(load(path, tokenizer).prompts) == 4
    config = DatasetConfig(path=str(path))
    once = load_prompts(config, tokenizer, max_prompt_tokens=500, chat_template_options={}, drop_repeated=True)
    assert [p.prompt_id for p in once.prompts] == ["verl:0", "verl:2"]
    assert (once.num_repeated, once.num_dropped_too_long) == (2, 0)
    path = write_jsonl(tmp_path / "own.jsonl", GOOD, GOOD | {"ground_truth": "10"}, GOOD | {"row_id": 3})
    config = DatasetConfig(path=str(path))
    once = load_prompts(config, tokenizer, max_prompt_tokens=500, chat_template_options={}, drop_repeated=True)
    assert [p.ground_truth for p in once.prompts] == ["2", "10"]
    tests = [{"prompt": "f(x)?", "tests": [{"input": i, "id": i}]} for i in (1, 2, 1)]
    config = DatasetConfig(path=str(write_jsonl(tmp_path / "tests.jsonl", *tests)), ground_truth_field=None)
    once = load_prompts(config, tokenizer, max_prompt_tokens=500, chat_template_options={}, drop_repeated=True)
    assert [p.prompt_id for p in once.prompts] == ["tests:0", "tests:1"], "a reward judges by the row's tests"
    choices = [{"prompt": "A or B?", "answer_idx": i} for i in "ABA"]
    config = DatasetConfig(path=str(write_jsonl(tmp_path / "c.jsonl", *choices)), ground_truth_field="answer_idx")
    once = load_prompts(config, tokenizer, max_prompt_tokens=500, chat_template_options={}, drop_repeated=True)
    assert [p.ground_truth for p in once.prompts] == ["A", "B"], "the ground truth is no identifier"
    sums = DatasetConfig(path="reasoning_gym:basic_arithmetic", size=300, options={"max_terms": 2, "max_digits": 1})
    made = load_prompts(sums, tokenizer, max_prompt_tokens=500, chat_template_options={}, drop_repeated=True)
    assert len(made.prompts) == 300 > len({p.token_ids for p in made.prompts})


def test_long_prompts_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "x" * n, "ground_truth": "1"} for n in (1, 100, 2, 300)]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    result = load(path, tokenizer, max_prompt_tokens=60)
    assert [p.prompt_id for p in result.prompts] == ["a:0", "a:2"]  # ids do not move when rows are dropped
    assert result.num_dropped_too_long == 2
    longest = len(load(path, tokenizer).prompts[3].token_ids)
    assert load(path, tokenizer, max_prompt_tokens=longest).num_dropped_too_long == 0
    assert load(path, tokenizer, max_prompt_tokens=longest - 1).num_dropped_too_long == 1
    with pytest.raises(DataError, match=rf"all 4 prompts .*max_prompt_tokens=5 \(the longest has {longest} tokens"):
        load(path, tokenizer, max_prompt_tokens=5)


GOOD = {"prompt": "1+1?", "ground_truth": "2"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "1+1?", ', r":2: broken JSON: .* column"),
        ("[" * 5000, r":2: broken JSON"),
        ("[1, 2]", r":2: a row must be a JSON object, not a list"),
        ({"promt": "1+1?", "ground_truth": "2"}, r":2: no field 'prompt'; the row has promt, .*did you mean promt\?"),
        ({"prompt": None, "ground_truth": "2"}, r":2: prompt is null; fix the row, or set prompt_field to"),
        ({"prompt": 5, "ground_truth": "2"}, r":2: prompt must be text or a list of messages, not a int"),
        ({"prompt": [], "ground_truth": "2"}, r":2: prompt is an empty list of messages"),
        ({"prompt": " \n", "ground_truth": "2"}, r":2: prompt\[0\]: content is empty"),
        (
            {"prompt": ["hi"], "ground_truth": "2"},
            r":2: prompt\[0\] must be an object with role and content, not a str",
        ),
        ({"prompt": [{"role": "user"}], "ground_truth": "2"}, r":2: prompt\[0\]: content must be text, not null"),
        (
            {"prompt": [{"role": "assistant", "tool_calls": ["add"]}], "ground_truth": "2"},
            r":2: prompt\[0\]: tool_calls must be a list of objects with name",
        ),
        ({"prompt": [{"content": "x"}], "ground_truth": "2"}, r":2: prompt\[0\]: role must be text, not null"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "ground_truth": "2"},
            r":2: prompt\[0\]: content must be text, not a list",
        ),
        ({"prompt": [{"role": "assistant", "content": "x"}], "ground_truth": "2"}, r":2: .*ends with an assistant"),
        ({"prompt": [{"role": "system", "content": "x"}], "ground_truth": "2"}, r":2: prompt has no user message"),
        ('{"prompt": "\\ud800", "ground_truth": "2"}', r":2: prompt\[0\]: content contains half of a surrogate pair"),
        ({"prompt": "1+1?"}, r":2: no field 'ground_truth'; the row has prompt.*set ground_truth_field"),
        ({"prompt": "1+1?", "ground_truth": None}, r":2: ground_truth is null"),
        ({"prompt": "1+1?", "reward_model": {"style": "rule"}}, r":2: ground_truth is null"),
        ({**GOOD, "reward": 1.0}, r":2: reward must be text, not a float"),
        ({**GOOD, "data_source": 3}, r":2: data_source must be text, not a int"),
    ],
)
def test_a_broken_row_is_an_error_with_file_and_line(tmp_path, tokenizer, row, message):
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD, row)
    with pytest.raises(DataError, match=message) as error:
        load(path, tokenizer)
    assert str(error.value).startswith(f"{path}:2: ")


def test_bytes_that_are_no_text_are_an_error_with_line(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8 text"):
        load(path, tokenizer)


def test_a_byte_order_mark_is_no_error(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(load(path, tokenizer).prompts) == 1


def test_a_broken_parquet_row_is_named_by_number(tmp_path, tokenizer):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, {"prompt": "2+2?", "ground_truth": None}]), path)
    with pytest.raises(DataError, match=r"rows\.parquet row 2: ground_truth is null"):
        load(path, tokenizer)
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file"):
        load(path, tokenizer)


def test_what_the_template_refuses_is_an_error_with_line(tmp_path):
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template refuses .*\(system, user\): no system here"):
        load(write_jsonl(tmp_path / "a.jsonl", GOOD), tokenizer, system_prompt="Think.")


def test_missing_sources_name_the_nearest(tmp_path, tokenizer):
    write_jsonl(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"tran\.jsonl does not exist; did you mean .*train\.jsonl\?"):
        load(tmp_path / "tran.jsonl", tokenizer)
    with pytest.raises(DataError, match=r"q\.parquet does not exist \(looked in"):
        load(tmp_path / "q.parquet", tokenizer)
    for path in (tmp_path / "nowhere", "./nowhere", "~/nowhere"):
        with pytest.raises(DataError, match=r"nowhere does not exist"):
            load(path, tokenizer)
    with pytest.raises(DataError, match=r"ROWS\.JSONL does not exist"):
        load("ROWS.JSONL", tokenizer)
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist either"):
        load(tmp_path / "nowhere" / "train.jsonl", tokenizer)
    (tmp_path / "rows.csv").write_text("prompt\n")
    with pytest.raises(DataError, match=r"unknown file type '\.csv'; supported are \.jsonl"):
        load(tmp_path / "rows.csv", tokenizer)
    write_jsonl(tmp_path / "empty.jsonl", "")
    with pytest.raises(DataError, match="holds no rows"):
        load(tmp_path / "empty.jsonl", tokenizer)


def test_a_hub_name_without_network_says_so(tokenizer, monkeypatch):
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"openai/gsm8k: no such file or folder here, and the hub cannot be reached"):
        load("openai/gsm8k", tokenizer)


def test_settings_that_do_not_apply_are_errors(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match="split does not apply to a file"):
        load(path, tokenizer, split="test")
    with pytest.raises(DataError, match="seed does not apply to a file"):
        load(path, tokenizer, seed=1)
    with pytest.raises(DataError, match="options does not apply to a file"):
        load(path, tokenizer, options={"a": 1})
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", GOOD)
    with pytest.raises(DataError, match="seed does not apply to a dataset folder"):
        load(tmp_path / "folder", tokenizer, seed=1)
    with pytest.raises(DataError, match="options does not apply to a hub dataset"):
        load("org/name", tokenizer, options={"a": 1})
    with pytest.raises(DataError, match="subset does not apply to a reasoning_gym task"):
        load("reasoning_gym:chain_sum", tokenizer, subset="main")


def test_other_field_names_and_no_ground_truth(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "2"})
    (prompt,) = load(path, tokenizer, prompt_field="question", ground_truth_field="answer").prompts
    columns = {"question": "1+1?", "answer": "2"}  # which a TRL reward may ask for by their names
    assert (prompt.text, prompt.ground_truth, dict(prompt.extra)) == ("1+1?", "2", columns)
    (prompt,) = load(path, tokenizer, prompt_field="question", ground_truth_field=None).prompts
    assert (prompt.ground_truth, dict(prompt.extra)) == (None, columns)


def test_validate_refuses_a_ground_truth_with_its_line(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", GOOD, {"prompt": "1+1?", "ground_truth": "two"})

    def is_number(prompt: Prompt) -> None:
        if not prompt.ground_truth.isdigit():
            raise GroundTruthError(f"{prompt.ground_truth!r} is no number")

    config = DatasetConfig(path=str(path))
    with pytest.raises(GroundTruthError, match=r"a\.jsonl:2: 'two' is no number"):
        load_prompts(config, tokenizer, max_prompt_tokens=99, chat_template_options={}, validate=is_number)


def test_an_unknown_reward_is_named_with_its_line(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", GOOD, GOOD | {"reward": "mat"})

    def load_reward(prompt: Prompt) -> None:
        if prompt.reward is not None:
            raise ConfigError(f"unknown reward {prompt.reward!r}")

    config = DatasetConfig(path=str(path))
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: unknown reward 'mat'"):
        load_prompts(config, tokenizer, max_prompt_tokens=99, chat_template_options={}, validate=load_reward)


def test_reasoning_gym_rows_can_be_scored_by_their_task(tokenizer):
    import reasoning_gym

    options = {"min_terms": 2, "max_terms": 3}
    settings = {"size": 4, "seed": 5, "options": options, "prompt_suffix": "\nShow your work."}
    result = load("reasoning_gym:chain_sum", tokenizer, **settings)
    assert result.name == "chain_sum"
    assert len(result.prompts) == 4
    prompt = result.prompts[3]
    assert prompt.data_source == "reasoning_gym:chain_sum"
    assert prompt.text == prompt.extra["question"] + "\nShow your work."
    task = reasoning_gym.create_dataset("chain_sum", **prompt.extra["options"])
    entry = {
        "question": prompt.extra["question"],
        "answer": prompt.ground_truth,
        "metadata": prompt.extra["metadata"],
    }
    assert task.score_answer(prompt.ground_truth, entry) == 1.0
    assert task.score_answer("no", entry) < 1.0
    assert load("reasoning_gym:chain_sum", tokenizer, **settings) == result
    assert len(load("reasoning_gym:chain_sum", tokenizer).prompts) == 500  # the task's own size
    assert load("reasoning_gym:chain_sum", tokenizer, **{**settings, "seed": 6}).prompts != result.prompts


def test_a_mixture_of_reasoning_gym_tasks_holds_rows_of_each(tokenizer):
    """Each row is one of the task that it was drawn from, and is scored with that task's options."""
    specs = [{"name": "chain_sum", "config": {"max_terms": 3, "seed": 3}}, {"name": "gsm_symbolic", "weight": 3}]
    result = load("reasoning_gym:composite", tokenizer, size=40, seed=1, options={"datasets": specs})
    reward = load_reward("reasoning_gym")
    sources = [prompt.data_source for prompt in result.prompts]
    assert set(sources) == {"reasoning_gym:chain_sum", "reasoning_gym:gsm_symbolic"}
    assert sources.count("reasoning_gym:gsm_symbolic") > 20
    for prompt in result.prompts:
        assert prompt.extra["options"] == ({"max_terms": 3} if prompt.data_source.endswith("sum") else {})
        reward.validate_ground_truth(prompt.ground_truth, {**prompt.extra, "data_source": prompt.data_source})


@pytest.mark.parametrize("task", ["ransom_note", "list_functions"])
def test_reasoning_gym_rows_are_the_same_in_every_process(task):
    """Sets of words have an order that depends on the hash seed, and one task draws from the global generator: a
    resumed run must find the problems that it had."""
    code = (
        "from rl.config import DatasetConfig; from rl.prompts.rows import read_rows; import sys\n"
        f"rows = read_rows(DatasetConfig(path='reasoning_gym:{task}', size=12, seed=1))\n"
        "sys.stdout.write(repr([row.fields for row in rows]))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_reasoning_gym_tasks_without_an_answer_are_scored_by_metadata(tokenizer):
    prompts = load("reasoning_gym:rush_hour", tokenizer, max_prompt_tokens=5000, size=1).prompts
    assert prompts[0].ground_truth is None
    assert prompts[0].extra["metadata"]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("reasoning_gym:chain_sun", {}, "no task 'chain_sun'; did you mean chain_sum"),
        ("reasoning_gym:chain_sum", {"min_term": 2}, "chain_sum has no option min_term; it takes min_terms, max_terms"),
        ("reasoning_gym:chain_sum", {"size": 2}, "chain_sum has no option size; use the dataset's own size and seed"),
        ("reasoning_gym:chain_sum", {"min_terms": 5, "max_terms": 3}, "the task rejects the options .*max_terms"),
        ("reasoning_gym:composite", {"datasets": [{"task": "chain_sum"}]}, "the task rejects the options .*'task'"),
        ("reasoning_gym:composite", {"datasets": ["chain_sum"]}, "the task rejects the options .*mapping"),
        ("reasoning_gym:composite", {}, "the task rejects the options .*at least one dataset"),
        (
            ["reasoning_gym:chain_sum", "a.jsonl"],
            {},
            "be part of a list; use reasoning_gym:composite to mix",
        ),
    ],
)
def test_reasoning_gym_mistakes(tokenizer, path, options, message):
    with pytest.raises(DataError, match=message):
        load(path, tokenizer, options=options)


def test_an_unused_template_option_is_an_error(tmp_path, tokenizer):
    config = DatasetConfig(path=str(write_jsonl(tmp_path / "a.jsonl", GOOD)))
    with pytest.raises(ConfigError, match=r"chat_template_options\.enable_thinkng: .* never reads"):
        load_prompts(config, tokenizer, max_prompt_tokens=99, chat_template_options={"enable_thinkng": False})

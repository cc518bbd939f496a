"""The example rows in docs/data.md load, and its configuration validates."""

import re
from pathlib import Path

import yaml

from launch.tiny_models import build_tokenizer
from rl.config import CurriculumConfig, DataConfig, DatasetConfig, SftDataConfig
from rl.prompts import load_prompts, load_sft_examples
from rl.prompts.rows import read_rows

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_example_rows_load(tmp_path):
    tokenizer = build_tokenizer("qwen3")
    prompts, verl, sft = blocks("jsonl")
    path = tmp_path / "rows.jsonl"
    path.write_text(prompts + verl)
    loaded = load_prompts(DatasetConfig(path=str(path)), tokenizer, max_prompt_tokens=500, chat_template_options={})
    assert [p.ground_truth for p in loaded.prompts] == ["42"] * 4
    assert loaded.prompts[2].extra == {"level": 3}
    path.write_text(sft)
    config = SftDataConfig(train=DatasetConfig(path=str(path)))
    assert len(load_sft_examples(config, tokenizer, chat_template_options={}).examples) == 3


def test_the_example_configurations_are_valid():
    sources, mixture, curriculum = blocks("yaml")
    assert DataConfig.model_validate(yaml.safe_load(curriculum)["data"]).curriculum == CurriculumConfig()
    data = DataConfig.model_validate(yaml.safe_load(sources)["data"])
    assert data.train.prompt_suffix == r" Put your final answer in \boxed{}."
    assert data.eval[1].options == {"min_terms": 3, "max_terms": 5}
    rows = list(read_rows(DatasetConfig.model_validate(yaml.safe_load(mixture))))
    assert len(rows) == 1000
    assert len({row.fields["data_source"] for row in rows}) == 2

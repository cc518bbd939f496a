"""Supervised examples are tokenized exactly as the chat template writes them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch.tiny_models import build_tokenizer
from rl.config import DatasetConfig, SftDataConfig
from rl.errors import DataError
from rl.prompts import SftSet, load_sft_examples

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "1+1?"},
]


def released(family: Any, template: str) -> PreTrainedTokenizerFast:
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    tokenizer = build_tokenizer(family)
    tokenizer.chat_template = (Path(spec.origin).parent / "chat_templates" / f"{template}.jinja").read_text()
    return tokenizer


def load(
    tmp_path: Path,
    tokenizer: Any,
    *rows: Any,
    max_tokens: int = 3000,
    options: dict[str, Any] | None = None,
    **train: Any,
) -> SftSet:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SftDataConfig(train=DatasetConfig(path=str(path), **train), max_tokens=max_tokens)
    return load_sft_examples(config, tokenizer, chat_template_options=options or {})


def texts(examples: SftSet, tokenizer: Any) -> list[tuple[str, str]]:
    return [(tokenizer.decode(e.prompt_ids), tokenizer.decode(e.response_ids)) for e in examples.examples]


def test_a_response_that_calls_a_tool_is_what_the_template_writes_or_an_error(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    row = {"messages": [{"role": "user", "content": "1+1?"}, call]}
    (_, response), *_ = texts(load(tmp_path, released("qwen3", "qwen3"), row), build_tokenizer("qwen3"))
    assert (
        response == '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
    silent = build_tokenizer("qwen3")
    silent.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="the chat template does not write the response's tool calls"):
        load(tmp_path, silent, row)


def test_problems_without_responses_are_refused():
    config = SftDataConfig(train=DatasetConfig(path="reasoning_gym:chain_sum"))
    with pytest.raises(DataError, match="reasoning_gym:chain_sum: reasoning_gym makes problems without worked resp"):
        load_sft_examples(config, build_tokenizer("qwen3"), chat_template_options={})


def test_prompt_and_response_rows(tmp_path):
    tokenizer = build_tokenizer("qwen3")
    result = load(tmp_path, tokenizer, {"prompt": "1+1?", "response": "<think>easy</think>2"}, prompt_suffix=" Box it.")
    prompt = "<|im_start|>user\n1+1? Box it.<|im_end|>\n<|im_start|>assistant\n"
    assert texts(result, tokenizer) == [(prompt, "<think>easy</think>2<|im_end|>")]
    assert (result.name, result.num_dropped_too_long, result.num_verbatim) == ("examples", 0, 0)


@pytest.mark.parametrize(
    ("family", "template", "response", "completion"),
    [
        ("qwen3", "qwen3", {"content": "2"}, "<think>\n\n</think>\n\n2<|im_end|>"),
        ("qwen3", "qwen3", {"content": "<think>\neasy\n</think>\n\n2"}, "<think>\neasy\n</think>\n\n2<|im_end|>"),
        ("qwen3", "qwen3", {"content": "<think>easy</think>2"}, "<think>\neasy\n</think>\n\n2<|im_end|>"),
        ("qwen3", "qwen3", {"content": "2", "reasoning_content": "easy"}, "<think>\neasy\n</think>\n\n2<|im_end|>"),
        ("gpt_oss", "gptoss", {"content": "2"}, "<|channel|>final<|message|>2<|return|>"),
        (
            "gpt_oss",
            "gptoss",
            {"content": "2", "thinking": "easy"},
            "<|channel|>analysis<|message|>easy<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>",
        ),
    ],
)
def test_released_templates_are_followed_exactly(tmp_path, family, template, response, completion):
    tokenizer = released(family, template)
    turn = {"role": "assistant", **response}
    result = load(tmp_path, tokenizer, {"messages": [*MESSAGES, turn]})
    whole = tokenizer.apply_chat_template([*MESSAGES, turn], return_dict=False, strftime_now=lambda _: "2026-01-01")
    (example,) = result.examples
    learned = [*example.prompt_ids.tolist(), *example.response_ids.tolist()]
    assert learned == whole[: len(learned)]
    assert tokenizer.decode(whole[len(learned) :]).strip() == ""
    assert texts(result, tokenizer)[0][1] == completion
    assert result.num_verbatim == 0


def test_a_prompt_that_closes_thinking_is_continued(tmp_path):
    tokenizer = released("qwen3", "qwen3")
    result = load(tmp_path, tokenizer, {"prompt": "1+1?", "response": "2"}, options={"enable_thinking": False})
    ((prompt, response),) = texts(result, tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert response == "2<|im_end|>"


def test_a_template_that_cuts_the_thinking_is_not_followed(tmp_path):
    """DeepSeek-R1's template opens <think> in the prompt and leaves reasoning out of assistant turns."""
    tokenizer = released("qwen3", "deepseek_r1_distill")
    rows = [{"prompt": "1+1?", "response": r} for r in ("\n<think>\neasy\n</think>\n2", "easy\n</think>\n2")]
    result = load(tmp_path, tokenizer, *rows)
    assert result.num_verbatim == 2
    for prompt, response in texts(result, tokenizer):
        assert prompt.endswith("<think>\n")
        assert response == "easy\n</think>\n2<|im_end|>"
    with pytest.raises(DataError, match=r"examples\.jsonl:1: .* opens <think> in the prompt, but the response has no"):
        load(tmp_path, tokenizer, {"prompt": "1+1?", "response": "2"})


def test_thinking_that_the_template_ignores_is_an_error(tmp_path):
    turn = {"role": "assistant", "content": "2", "reasoning_content": "easy"}
    with pytest.raises(DataError, match="does not write the response's thinking"):
        load(tmp_path, build_tokenizer("qwen3"), {"messages": [*MESSAGES, turn]})


@pytest.mark.parametrize(
    ("family", "template", "options", "remedy"),
    [
        ("qwen3", "qwen3_8", {}, r"into the key that the template reads \(reasoning_content\)"),
        ("gpt_oss", "gptoss", {}, r"into the key that the template reads \(thinking\)"),
        ("qwen3", "qwen3", {"enable_thinking": False}, "has turned thinking off, so turn it on"),
    ],
)
def test_thinking_in_the_text_is_not_learned_as_the_answer(tmp_path, family, template, options, remedy):
    """qwen3_8 writes an empty block before the text, harmony puts all of it into the final channel, and a prompt whose
    thinking is turned off has closed its block."""
    row = {"prompt": "1+1?", "response": "<think>easy</think>2"}
    with pytest.raises(DataError, match=rf"examples\.jsonl:1: the response's text contains </think>, but .*{remedy}"):
        load(tmp_path, released(family, template), row, options=options)


def test_an_answer_may_speak_of_the_tag_and_an_empty_block_is_not_repeated(tmp_path):
    tokenizer = released("qwen3", "qwen3")
    said = {"role": "assistant", "content": "It is </think>.", "reasoning_content": "easy"}
    result = load(tmp_path, tokenizer, {"prompt": "Which tag?", "response": [said]})
    assert texts(result, tokenizer)[0][1] == "<think>\neasy\n</think>\n\nIt is </think>.<|im_end|>"
    row = {"prompt": "1+1?", "response": "<think>\n\n</think>\n\n2"}
    result = load(tmp_path, tokenizer, row, options={"enable_thinking": False})
    assert texts(result, tokenizer)[0][1] == "2<|im_end|>"


@pytest.mark.parametrize(
    ("template", "key", "remedy"),
    [
        ("qwen3", "reasoning", r"put the thinking into the key that the template reads \(reasoning_content\)"),
        ("deepseek_r1_distill", "reasoning", "put the thinking into content, as text between <think> tags"),
    ],
)
def test_thinking_under_a_key_that_the_template_does_not_read_is_an_error(tmp_path, template, key, remedy):
    row = {"prompt": "1+1?", "response": [{"role": "assistant", "content": "2", key: "easy"}]}
    with pytest.raises(DataError, match=f"does not write the response's thinking .*{remedy}"):
        load(tmp_path, released("qwen3", template), row)
    row["response"][0][key] = {"effort": "low"}  # no thinking
    assert load(tmp_path, released("qwen3", "qwen3"), row).num_verbatim == 0


def test_a_template_without_an_end_of_turn_gets_one(tmp_path):
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    result = load(tmp_path, tokenizer, {"prompt": "1+1?", "response": "2"})
    assert texts(result, tokenizer) == [("user: 1+1?\nassistant: ", "2\n<|im_end|>")]


def test_what_a_template_writes_after_the_turn_is_not_learned(tmp_path):
    """As Phi-3's, which ends a conversation with EOS behind the end of the last turn: a rollout stops at the turn's."""
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer.eos_token = "<|endoftext|>"
    result = load(tmp_path, tokenizer, {"prompt": "1+1?", "response": "2"})
    assert texts(result, tokenizer) == [("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "2<|im_end|>")]
    assert result.num_verbatim == 0


def byte_level_tokenizer(*, prefix_space, merges=()):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def test_a_token_across_the_border_does_not_change_the_prompt(tmp_path):
    """Here ": " and "2" would merge into one token; a rollout starts from the prompt's own tokens, so SFT does too."""
    tokenizer = byte_level_tokenizer(prefix_space=False, merges=[("Ġ", "2")])
    assert len(tokenizer(": 2").input_ids) == 2
    result = load(tmp_path, tokenizer, {"prompt": "1+1?", "response": "2"})
    assert texts(result, tokenizer) == [("user: 1+1?<|end|>assistant: ", "2<|end|>")]
    prompt = tokenizer.apply_chat_template([MESSAGES[2]], add_generation_prompt=True, return_dict=False)
    assert result.examples[0].prompt_ids.tolist() == prompt


def test_a_tokenizer_that_starts_every_text_with_a_space_does_not_start_responses_with_one(tmp_path):
    tokenizer = byte_level_tokenizer(prefix_space=True)
    ((_, response),) = texts(load(tmp_path, tokenizer, {"prompt": "1+1?", "response": "2"}), tokenizer)
    assert response == "2<|end|>"


def test_a_response_may_be_one_assistant_message(tmp_path):
    tokenizer = build_tokenizer("qwen3")
    row = {"prompt": MESSAGES, "response": [{"role": "assistant", "content": "2"}]}
    ((prompt, response),) = texts(load(tmp_path, tokenizer, row), tokenizer)
    assert prompt.count("<|im_start|>") == 4
    assert response == "2<|im_end|>"


def test_long_examples_are_dropped_and_counted(tmp_path):
    rows = [{"prompt": "1+1?", "response": "2" * n} for n in (1, 500, 3)]
    result = load(tmp_path, build_tokenizer("qwen3"), *rows, max_tokens=100)
    assert (len(result.examples), result.num_dropped_too_long) == (2, 1)
    longest = len(result.examples[1].prompt_ids) + len(result.examples[1].response_ids) + 497
    with pytest.raises(DataError, match=rf"all 3 examples .* data\.max_tokens=5 \(the longest has {longest} tokens\)"):
        load(tmp_path, build_tokenizer("qwen3"), *rows, max_tokens=5)
    with pytest.raises(DataError, match="holds no rows"):
        load(tmp_path, build_tokenizer("qwen3"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "2"}, "no field 'prompt'"),
        ({"prompt": "1+1?"}, "no field 'response'"),
        ({"prompt": "1+1?", "response": ""}, r"response\[0\]: content is empty"),
        ({"prompt": "1+1?", "response": 2}, "response must be text or a list of messages, not a int"),
        ({"prompt": "1+1?", "response": MESSAGES}, "response must be text or one assistant message"),
        ({"messages": MESSAGES}, "messages must consist of a prompt and the assistant message to learn"),
        (
            {"messages": [{"role": "assistant", "content": "2"}]},
            "messages must consist of a prompt and the assistant",
        ),
    ],
)
def test_a_broken_row_is_an_error_with_file_and_line(tmp_path, row, message):
    good = {"prompt": "1+1?", "response": "2"}
    with pytest.raises(DataError, match=rf"examples\.jsonl:2: {message}"):
        load(tmp_path, build_tokenizer("qwen3"), good, row)

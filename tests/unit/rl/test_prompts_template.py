"""Loading tokenizers, and chat templates as released."""

import importlib.util
from pathlib import Path

import pytest

from launch.tiny_models import build_tiny_model, build_tokenizer
from rl.config import ModelConfig
from rl.errors import ConfigError, DataError
from rl.prompts import ChatTemplate, load_tokenizer

QUESTION = [{"role": "user", "content": "1+1?"}]


def released_template(name: str) -> str:
    """A released model's own chat template, from the copies that TRL ships (found without importing it)."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def test_load_tokenizer_applies_the_template_file(tmp_path):
    build_tokenizer("qwen3").save_pretrained(tmp_path / "model")
    (tmp_path / "mine.jinja").write_text("Q: {{ messages[0].content }} A:")
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / "model"), chat_template=str(tmp_path / "mine.jinja")))
    assert ChatTemplate(tokenizer, {}).render(QUESTION, "", add_generation_prompt=True) == "Q: 1+1? A:"
    with pytest.raises(ConfigError, match=r"model\.chat_template .*other\.jinja: cannot read it"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "model"), chat_template=str(tmp_path / "other.jinja")))


def test_a_checkpoint_that_cannot_be_used_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path .*nowhere is not a folder"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model\.path .*empty: cannot load a tokenizer"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "empty")))
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"no chat template .*set model\.chat_template"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "base")))
    tokenizer = build_tokenizer("qwen3")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ConfigError, match="no EOS token"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "endless")))


def test_a_hub_checkpoints_tokenizer_is_of_its_revision(monkeypatch):
    asked = []

    def from_pretrained(path, **options):
        asked.append((path, options))
        return build_tokenizer("qwen3")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    load_tokenizer(ModelConfig(path="org/name", revision="abc123"))
    assert asked == [("org/name", {"revision": "abc123", "trust_remote_code": False})]


def test_the_options_of_a_configuration_stay_as_they_are():
    tokenizer, options = build_tokenizer("qwen3"), {"current_date": "2025-08-05"}
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}"
    for _ in range(2):  # the training data's template and the evaluation's
        assert ChatTemplate(tokenizer, options).render(QUESTION, "", add_generation_prompt=True) == "2025-08-05"


def test_thinking_is_switched_by_the_template_options():
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = released_template("qwen3")
    on = ChatTemplate(tokenizer, {}).render(QUESTION, "", add_generation_prompt=True)
    off = ChatTemplate(tokenizer, {"enable_thinking": False}).render(QUESTION, "", add_generation_prompt=True)
    assert off == on + "<think>\n\n</think>\n\n"


def test_gpt_oss_takes_reasoning_effort_and_a_date_that_does_not_move():
    tokenizer = build_tokenizer("gpt_oss")
    tokenizer.chat_template = released_template("gptoss")

    def prompt(**options: object) -> str:
        return ChatTemplate(tokenizer, options).render(QUESTION, "", add_generation_prompt=True)

    assert "Reasoning: medium" in prompt()
    assert "Reasoning: high" in prompt(reasoning_effort="high")
    assert "Current date: 2026-01-01\n" in prompt()
    assert "Current date: 2025-08-05\n" in prompt(current_date="2025-08-05")
    with pytest.raises(ConfigError, match="reasoning_effort is 'hihg'; harmony models accept low, medium, high"):
        prompt(reasoning_effort="hihg")
    with pytest.raises(ConfigError, match="current_date is 'today'"):
        prompt(current_date="today")
    with pytest.raises(ConfigError, match="chat template never reads current_date"):
        ChatTemplate(build_tokenizer("qwen3"), {"current_date": "2025-08-05"})
    ChatTemplate(build_tokenizer("qwen3"), {"current_date": None, "reasoning_effort": None})  # what unsets them


def test_what_is_no_template_and_what_is_no_tokenizer_are_refused(tmp_path):
    folder = build_tiny_model("qwen3", tmp_path / "model")
    text = tmp_path / "text.jinja"
    text.write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.jinja: the chat template never reads messages"):
        load_tokenizer(ModelConfig(path=str(folder), chat_template=str(text)))
    text.write_text("{% for m in messages %}{{ 1 / 0 }}{% endfor %}")
    template = ChatTemplate(load_tokenizer(ModelConfig(path=str(folder), chat_template=str(text))), {})
    with pytest.raises(DataError, match=r"x:1: the chat template refuses these messages \(user\): division by zero"):
        template.render(QUESTION, "x:1", add_generation_prompt=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="the tokenizer produces no tokens for a text; is tokenizer.json missing"):
        load_tokenizer(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("family", "template", "end"),
    [
        ("qwen3", "qwen3", "<|im_end|>"),
        ("gpt_oss", "gptoss", "<|return|>"),
        ("qwen3", None, "<|im_end|>"),
    ],
)
def test_the_end_of_turn_is_what_the_template_writes(family, template, end):
    tokenizer = build_tokenizer(family)
    tokenizer.eos_token = "<|endoftext|>"  # as in base models
    if template is not None:
        tokenizer.chat_template = released_template(template)
    assert ChatTemplate(tokenizer, {}).end_of_turn_id == tokenizer.convert_tokens_to_ids(end)


def test_an_option_that_is_unset_is_not_there_for_the_template():
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = "{% if thinking is defined %}defined{% else %}unset{% endif %}"
    messages = [{"role": "user", "content": "a"}]
    for value, expected in ((None, "unset"), (False, "defined")):
        template = ChatTemplate(tokenizer, {"thinking": value})
        assert template.render(messages, "here", add_generation_prompt=True) == expected


PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_an_eos_behind_the_whole_conversation_is_not_the_end_of_a_turn():
    """As Phi-3's template has it."""
    tokenizer = build_tokenizer("qwen3")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = PHI
    assert ChatTemplate(tokenizer, {}).end_of_turn_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_template_without_an_end_of_turn_gets_the_eos_token():
    tokenizer = build_tokenizer("qwen3")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert ChatTemplate(tokenizer, {}).end_of_turn_id == tokenizer.eos_token_id

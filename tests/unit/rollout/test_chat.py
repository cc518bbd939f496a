"""What of a response is the final answer."""

import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launch.tiny_models import HARMONY_SPECIAL_TOKENS, QWEN_SPECIAL_TOKENS, build_tokenizer
from rollout.chat import AnswerExtractor, think_answer
from rollout.harmony import HarmonyTokens, open_message, parse

QWEN = build_tokenizer("qwen3")
HARMONY = build_tokenizer("gpt_oss")
QWEN_EXTRACTOR = AnswerExtractor(QWEN)
HARMONY_EXTRACTOR = AnswerExtractor(HARMONY)

ASSISTANT = "<|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def qwen_answer(response: str, prompt: str = "<|im_start|>assistant\n") -> str:
    return QWEN_EXTRACTOR.extract(encode(QWEN, prompt), encode(QWEN, response)).answer


def harmony_answer(response: str, prompt: str = ASSISTANT) -> str:
    return HARMONY_EXTRACTOR.extract(encode(HARMONY, prompt), encode(HARMONY, response)).answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("4<|im_end|>", "4"),
        ("", ""),
        ("<think>2+2</think>\n\n4<|im_end|>", "4"),
        ("<think>2+2 is 4", ""),
        ("2+2</think> 4", "4"),
        ("<think>a</think> 3 <think>b</think> 4", "4"),
        ("<think>a</think> 3 <think>wait", ""),
        ("<think>a</think>", ""),
        ("<think>say </think> b</think> 4", "4"),
        ("<think>あ</think> 答えは４", "答えは４"),
    ],
)
def test_thinking(response, answer):
    assert qwen_answer(response) == answer


def test_a_prompt_that_opens_thinking():
    opened = "<|im_start|>assistant\n<think>\n"
    assert qwen_answer("2+2</think>4", opened) == "4"
    assert qwen_answer("2+2 is 4", opened) == ""
    assert qwen_answer("4", "<|im_start|>assistant\n<think>\n\n</think>\n\n") == "4"
    # A question about the tag opens nothing.
    assert qwen_answer("4", "<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n") == "4"


def test_the_text_keeps_thinking_tags_and_leaves_special_tokens_out():
    ids = encode(QWEN, "<think>a</think>4<|im_end|>")
    assert QWEN_EXTRACTOR.extract((), ids) == ("<think>a</think>4", "4")
    assert QWEN_EXTRACTOR.extract((), np.array(ids, dtype=np.int32)) == ("<think>a</think>4", "4")


def test_special_tokens_in_the_midst_of_a_response_are_left_out_of_its_text():
    ids = encode(QWEN, "<think>a<|im_start|></think>4<|endoftext|>2<|im_end|>")
    assert QWEN_EXTRACTOR.extract((), ids) == ("<think>a</think>42", "42")


def test_thinking_tags_that_the_tokenizer_calls_special_are_kept():
    tokenizer = build_tokenizer("qwen3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = encode(tokenizer, "<think>3</think>4<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "34"
    assert AnswerExtractor(tokenizer).extract((), ids) == ("<think>3</think>4", "4")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (f"{ANALYSIS}2+2<|end|>{ASSISTANT}{FINAL}4<|return|>", "4"),
        (f"{FINAL} 4 <|return|>", "4"),
        (f"{ANALYSIS}the final answer is 4<|return|>", ""),
        (f"{ANALYSIS}2+2 is 4", ""),
        (f"{ANALYSIS}2+2<|end|>{ASSISTANT}{FINAL}4 because", "4 because"),  # cut: what is there counts
        (f"{ANALYSIS}2+2<|end|>{ASSISTANT}<|channel|>commentary<|message|>5<|end|>", ""),
        (f"{FINAL}3<|end|>{ASSISTANT}{FINAL}4<|return|>", "4"),
        (f"{FINAL}4<|end|>{ASSISTANT}{ANALYSIS}was that right?<|end|>", "4"),
        (f"{ANALYSIS}x<|end|><|start|>user{FINAL}5<|end|>", ""),  # only the assistant answers
        (f"{ANALYSIS}x<|end|>{ASSISTANT}<|channel|>final <|constrain|>json<|message|>4<|return|>", "4"),
        (f"{ASSISTANT} to=functions.f<|channel|>commentary <|constrain|>json<|message|>{{}}<|call|>", ""),
        (f"{ANALYSIS}no end of message {ASSISTANT}{FINAL}4<|return|>", "4"),
        (f"{ANALYSIS}a {FINAL}5<|end|>", ""),  # channels are named in headers, not in content
        (f"<|end|>{FINAL}5<|end|>", ""),
        ("4", ""),
        ("<|channel|>final", ""),
        ("<|channel|><|message|>4", ""),
        ("<|message|>4", ""),
        ("", ""),
    ],
)
def test_harmony(response, answer):
    assert harmony_answer(response) == answer


def test_harmony_spelled_in_ordinary_characters_is_no_channel():
    """Reward hacking by writing the markers out: the characters are not the tokens."""
    spelled = [i for part in ("<", "|channel|>final<", "|message|>5") for i in encode(HARMONY, part)]
    ids = encode(HARMONY, ANALYSIS) + spelled + encode(HARMONY, "<|end|>")
    text, answer = HARMONY_EXTRACTOR.extract(encode(HARMONY, ASSISTANT), ids)
    assert f"<|channel|>analysis<|message|>{FINAL}5" in text
    assert answer == ""


def test_a_prompt_that_begins_the_final_message():
    assert harmony_answer("4<|return|>", f"<|start|>user<|message|>2+2?<|end|>{ASSISTANT}{FINAL}") == "4"
    assert harmony_answer("4<|return|>", f"<|start|>user<|message|>2+2?<|end|>{ASSISTANT}{FINAL}The answer is ") == "4"
    assert harmony_answer("2+2<|end|>", f"{ASSISTANT}{ANALYSIS}") == ""


def test_harmony_text_shows_the_channels():
    ids = encode(HARMONY, f"{ANALYSIS}2+2<|end|>{ASSISTANT}{FINAL}4<|return|>")
    assert HARMONY_EXTRACTOR.extract((), ids) == (f"{ANALYSIS}2+2<|end|>{ASSISTANT}{FINAL}4", "4")


@pytest.mark.parametrize("response", ["4", "", "<|channel|>final", "assistant"])
def test_harmony_without_a_prompt(response):
    assert HARMONY_EXTRACTOR.extract((), encode(HARMONY, response)).answer == ""


def test_harmony_messages_have_exact_ranges():
    tokens = HarmonyTokens.find(HARMONY.get_vocab())
    assert tokens is not None
    ids = encode(HARMONY, f"{ANALYSIS}ab<|end|>{ASSISTANT}{FINAL}4")
    first, second = parse(ids, tokens, HARMONY.decode)
    assert (first.role, first.channel) == ("assistant", "analysis")
    assert HARMONY.decode(ids[first.content.start : first.content.stop]) == "ab"
    assert (second.channel, second.content) == ("final", range(len(ids) - 1, len(ids)))
    assert open_message(encode(HARMONY, f"<|start|>user<|message|>x<|end|>{ASSISTANT}"), tokens) == encode(
        HARMONY, ASSISTANT
    )
    assert list(open_message(encode(HARMONY, "<|start|>user<|message|>x<|end|>"), tokens)) == []


def token_lists(tokenizer, special: tuple[str, ...]) -> st.SearchStrategy[list[int]]:
    """Mostly the tokens that matter, some words, some bytes that are no UTF-8, some ids outside the vocabulary."""
    pieces = [*special, "assistant", "final", "analysis", " 4 ", "</think>", "<think>"]
    known = st.sampled_from([encode(tokenizer, piece) for piece in pieces])
    wild = st.integers(0, len(tokenizer) + 40).map(lambda i: [i])
    return st.lists(known | wild, max_size=30).map(lambda parts: [i for part in parts for i in part])


@given(prompt=token_lists(QWEN, QWEN_SPECIAL_TOKENS), response=token_lists(QWEN, QWEN_SPECIAL_TOKENS))
def test_any_response_has_an_answer_that_ends_its_text(prompt, response):
    text, answer = QWEN_EXTRACTOR.extract(prompt, response)
    assert text.rstrip().endswith(answer)
    assert "<think>" not in answer
    assert "</think>" not in answer
    assert answer == answer.strip()
    if "</think>" not in text and QWEN.decode(prompt).rstrip().endswith("<think>"):
        assert answer == ""


KANA = encode(HARMONY, "あ")  # three bytes; the end token may fall between them


@given(prompt=token_lists(HARMONY, HARMONY_SPECIAL_TOKENS), response=token_lists(HARMONY, HARMONY_SPECIAL_TOKENS))
@example(prompt=[], response=[*encode(HARMONY, FINAL), *KANA[:2], HARMONY.eos_token_id, *KANA[2:]])
def test_any_harmony_response_has_an_answer_from_its_text(prompt, response):
    text, answer = HARMONY_EXTRACTOR.extract(prompt, response)
    assert answer in text
    if HARMONY.convert_tokens_to_ids("<|message|>") not in [*prompt, *response]:
        assert answer == ""


@given(reasoning=st.text(max_size=30), answer=st.text(max_size=30))
def test_a_well_formed_response_gives_back_its_answer(reasoning, answer):
    text = f"<think>{reasoning}</think>{answer}"
    if "think>" not in answer:
        assert think_answer(text) == answer.strip()
    assert think_answer(f"<think>{reasoning}".replace("</think>", "")) == ""


def test_extractors_pickle():
    again = pickle.loads(pickle.dumps(HARMONY_EXTRACTOR))
    ids = encode(HARMONY, f"{FINAL}4<|return|>")
    assert again.extract([], ids) == HARMONY_EXTRACTOR.extract([], ids)

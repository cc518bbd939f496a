"""What a response says: its text as people read it, and the part of it that is the final answer.

Left out: judging the answer (`rewards`), and rendering prompts (`rl.prompts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rollout import harmony

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
TokenIds = Sequence[int] | npt.NDArray[np.int32]
_PROMPT_TAIL = 16  # tokens; a generation prompt that opens a think block ends with the tag and white space


class Answer(NamedTuple):
    """A response, decoded. `answer` is always a part of `text`."""

    text: str  # without special tokens, except those that mark thinking or channels
    answer: str  # "" if the response never reached one


class AnswerExtractor:
    """Decodes responses and finds their final answers. The tokenizer's special tokens tell which chat format applies.

    - Thinking tags: the answer follows the *last* `</think>`. A `<think>` that is never closed means no answer, even if
      the prompt opened it. Without any tag the whole text is the answer, which is right for plain models.
    - Harmony: the answer is the content of the assistant's last message in the final channel, even if it was cut off;
      analysis and commentary never count. It is found by token id, and no token is ever encoded again.

    Pickles with its tokenizer. Never raises, whatever a model wrote; an id outside the vocabulary decodes to nothing.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._harmony = harmony.HarmonyTokens.find(vocabulary)
        kept = (THINK_OPEN, THINK_CLOSE) if self._harmony is None else harmony.STRUCTURE_TOKENS
        special = set(tokenizer.all_special_ids)
        special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._hidden = frozenset(special - {vocabulary[token] for token in kept if token in vocabulary})

    def extract(self, prompt_ids: Sequence[int], response_ids: TokenIds) -> Answer:
        """The response's text and final answer. `prompt_ids` decides in what state the response begins."""
        ids: list[int] = np.asarray(response_ids, dtype=np.int64).tolist()
        if self._harmony is not None:
            return self._extract_harmony(prompt_ids, ids, self._harmony)
        text = self._decode(ids)
        return Answer(text, think_answer(text, prompt_opens=self._prompt_opens_thinking(prompt_ids)))

    def _extract_harmony(self, prompt_ids: Sequence[int], ids: list[int], tokens: harmony.HarmonyTokens) -> Answer:
        before = harmony.open_message(prompt_ids, tokens)
        content = harmony.final_content(harmony.parse([*before, *ids], tokens, self._decode))
        if content is None:
            return Answer(self._decode(ids), "")
        # Positions within the response; the prompt may have begun the final message.
        begin, end = max(content.start - len(before), 0), max(content.stop - len(before), 0)
        answer = self._decode(ids[begin:end])
        return Answer(self._decode(ids[:begin]) + answer + self._decode(ids[end:]), answer.strip())

    def _prompt_opens_thinking(self, prompt_ids: Sequence[int]) -> bool:
        tail = self._tokenizer.decode(list(prompt_ids[-_PROMPT_TAIL:]))
        return tail.rstrip().endswith(THINK_OPEN)

    def _decode(self, ids: Sequence[int]) -> str:
        end = len(ids)
        while end and ids[end - 1] in self._hidden:
            end -= 1
        shown = ids[:end]
        if not self._hidden.isdisjoint(shown):  # rare, and testing is far cheaper than filtering
            shown = [i for i in shown if i not in self._hidden]
        return self._tokenizer.decode(shown, clean_up_tokenization_spaces=False)


def think_answer(text: str, *, prompt_opens: bool = False) -> str:
    """The text after the last `</think>`, without white space around it; "" if a block is never closed.

    Example: "<think>2+2</think> 4" gives "4"; "<think>2+2" gives ""; "4" gives "4", unless the prompt opened a block.
    """
    _, closed, after = text.rpartition(THINK_CLOSE)
    if THINK_OPEN in after or (prompt_opens and not closed):
        return ""
    return after.strip()

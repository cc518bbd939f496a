"""`repetition`: a penalty for saying the same thing again and again. Left out: stopping such a generation early."""

from __future__ import annotations

import re

from rewards.api import RewardInput, RewardOutput, register_reward
from rewards.format import nfkc
from rl.errors import ConfigError

# A word, a single character of a script that is written without spaces, or a single sign.
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f]|\w+?(?=[\u3040-\u30ff\u3400-\u9fff]|\b)|[^\w\s]"
)


@register_reward("repetition")
class RepetitionReward:
    """0 for text that does not repeat itself, down to -1 for text that does nothing else.

    The share of n-grams that occurred before in the response, above what is `free`: -(share - free) / (1 - free).
    n-grams are of words, and of single characters in scripts without spaces. (The measure of Yeo et al., arXiv
    2502.03373, and of open-r1's repetition penalty, with a free share.)

    Args:
        n: tokens in an n-gram. Short ones repeat in honest text.
        free: share of repeated n-grams that costs nothing.
        mask_digits: count all numbers as the same, so that a counter does not hide a loop. Sums and tables then repeat,
            too.
    """

    shaping = True

    def __init__(self, *, n: int = 8, free: float = 0.1, mask_digits: bool = False) -> None:
        if n < 1 or not 0.0 <= free < 1.0:
            raise ConfigError(f"reward 'repetition' needs n >= 1 and 0 <= free < 1, not n {n} and free {free}")
        self._n = n
        self._free = free
        self._mask_digits = mask_digits

    def __call__(self, sample: RewardInput) -> RewardOutput:
        share = repeated_share(sample.response, self._n, mask_digits=self._mask_digits)
        excess = max(0.0, share - self._free) / (1.0 - self._free)
        return RewardOutput(-excess, {"share": share})


def repeated_share(text: str, n: int, *, mask_digits: bool = False) -> float:
    """Share of the n-grams of `text` that occurred before in it; 0 for a text shorter than n tokens.

    Example: "a b a b a b" with n=2 has the 2-grams ab ba ab ba ab, of which 3 in 5 occurred before.
    """
    text = nfkc(text).casefold()
    if mask_digits:
        text = re.sub(r"\d+", "0", text)
    tokens = _TOKEN.findall(text)
    total = len(tokens) - n + 1
    if total <= 0:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + n]) for i in range(total)}) / total

"""`length`: a soft penalty for responses near the token limit, and brevity among the responses of one prompt.

Left out: responses that were cut, which `algorithm.mask_truncated` can leave out of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.api import RewardInput, RewardOutput, register_reward
from rl.errors import ConfigError


@register_reward("length")
class LengthReward:
    """A penalty for over-long responses, plus a bonus for the shorter right ones of a group.

    With L tokens in the response, the over-long part is DAPO's (arXiv 2503.14476, eq. 13): 0 up to
    max_tokens - buffer_tokens, -1 above max_tokens, a straight line between. The brevity part is that of Kimi k1.5
    (arXiv 2501.12599, section 2.3.3): with v = 0.5 - (L - shortest) / (longest - shortest) over the group's responses,
    v for a right response, min(0, v) for a wrong one, and 0 when all are equally long. The reward is
    overlong + brevity x part.

    Args:
        max_tokens: L_max; None: no over-long part.
        buffer_tokens: L_cache, the tokens over which the penalty grows.
        brevity: weight of the brevity part; 0: none. Warm up without it, as its authors do.
        right_above: a response is right when its task reward is above this.
    """

    shaping = True

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        buffer_tokens: int | None = None,
        brevity: float = 0.0,
        right_above: float = 0.0,
    ) -> None:
        if max_tokens is None and brevity == 0.0:
            raise ConfigError("reward 'length' has nothing to do; set max_tokens and buffer_tokens, or brevity")
        if (max_tokens is None) != (buffer_tokens is None):
            raise ConfigError("reward 'length' needs max_tokens and buffer_tokens together")
        if max_tokens is not None and buffer_tokens is not None and not 0 < buffer_tokens <= max_tokens:
            raise ConfigError(f"reward 'length': buffer_tokens {buffer_tokens} must be in 1..max_tokens {max_tokens}")
        if brevity < 0.0:
            raise ConfigError(f"reward 'length': brevity {brevity} must not be negative")
        self._max_tokens = max_tokens
        self._buffer_tokens = buffer_tokens
        self._brevity = brevity
        self._right_above = right_above

    def score_group(
        self, samples: Sequence[RewardInput], task_rewards: Sequence[float]
    ) -> list[RewardOutput | Exception]:
        counted = [s.num_tokens for s in samples if s.num_tokens or not s.response]
        shortest, longest = min(counted, default=0), max(counted, default=0)
        return [
            self._score(sample, reward > self._right_above, shortest, longest)
            for sample, reward in zip(samples, task_rewards, strict=True)
        ]

    def _score(self, sample: RewardInput, right: bool, shortest: int, longest: int) -> RewardOutput | Exception:
        length = sample.num_tokens
        if sample.response and not length:
            return ValueError("the response has no token count; give the row the field num_tokens")
        parts: dict[str, float] = {}
        if self._max_tokens is not None and self._buffer_tokens is not None:
            parts["overlong"] = overlong_penalty(length, self._max_tokens, self._buffer_tokens)
        if self._brevity:
            value = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
            parts["brevity"] = value if right else min(0.0, value)
        return RewardOutput(parts.get("overlong", 0.0) + self._brevity * parts.get("brevity", 0.0), parts)


def overlong_penalty(length: int, max_tokens: int, buffer_tokens: int) -> float:
    """DAPO, eq. 13: from 0 at max_tokens - buffer_tokens down to -1 at max_tokens, and -1 beyond."""
    return min(0.0, max(-1.0, (max_tokens - buffer_tokens - length) / buffer_tokens))

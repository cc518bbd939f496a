"""From a loss per token to one number, with denominators fixed for the whole global batch.

These denominators make the sum over micro-batches and ranks independent of the split. Left out: the losses.
"""

from __future__ import annotations

from typing import assert_never

from torch import Tensor

from rl.errors import LearnerError
from rl.losses.api import Aggregation, FlatTokens


def aggregate(
    per_token: Tensor,
    inputs: FlatTokens,
    mode: Aggregation,
    *,
    num_loss_tokens: int,
    num_sequences: int,
    fixed_length: int,
) -> Tensor:
    """[T] -> scalar: this micro-batch's share of the global loss. All micro-batches and ranks together add up to it.

    - token_mean: every loss token weighs the same (DAPO, arXiv 2503.14476, eq. 8);
    - sequence_mean_token_mean: mean in a sequence, then over sequences (GRPO, arXiv 2402.03300, eq. 3);
    - sequence_mean_token_sum: sum in a sequence, mean over sequences (REINFORCE; RLOO, arXiv 2402.14740);
    - fixed_length: sum over all tokens / (sequences x fixed_length) (Dr. GRPO, arXiv 2503.20783, section 3.2).

    `num_loss_tokens` and `num_sequences` count the global batch (or the mini-batch: whatever one optimizer step
    covers); `fixed_length` is the longest possible response. Raises LearnerError when the global batch holds no loss
    token (there is nothing to learn; skip the step).

    Example: sequences of 1 and 3 tokens, every token's loss 1: token_mean 4/4, sequence_mean_token_mean (1 + 1)/2,
    sequence_mean_token_sum (1 + 3)/2, fixed_length 8: 4/(2 x 8).
    """
    if num_loss_tokens < 1 or num_sequences < 1 or fixed_length < 1:
        raise LearnerError(
            f"cannot aggregate over num_loss_tokens {num_loss_tokens}, num_sequences {num_sequences}, fixed_length "
            f"{fixed_length}: each must be at least 1; skip the update of a batch without loss tokens"
        )
    match mode:
        case "token_mean":
            return inputs.masked(per_token).sum() / num_loss_tokens
        case "sequence_mean_token_mean":
            return inputs.sequence_mean(per_token).sum() / num_sequences
        case "sequence_mean_token_sum":
            return inputs.masked(per_token).sum() / num_sequences
        case "fixed_length":
            return inputs.masked(per_token).sum() / (num_sequences * fixed_length)
        case _:
            assert_never(mode)

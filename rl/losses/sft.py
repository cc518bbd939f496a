"""Negative log-likelihood of the response: supervised warm start through the same learner. Left out: aggregation."""

from __future__ import annotations

from rl.losses.api import LossInputs, PolicyLossOutput, register_policy_loss


@register_policy_loss("sft", default_aggregation="token_mean")
def sft_loss(inputs: LossInputs) -> PolicyLossOutput:
    """-log pi(token). Advantages and the other log-probabilities are not looked at."""
    return PolicyLossOutput(inputs.weighted(-inputs.logprobs))

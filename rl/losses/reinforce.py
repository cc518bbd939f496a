"""The plain policy gradient. Left out: every correction for off-policy data.

Williams 1992, "Simple statistical gradient-following algorithms", eq. 11.
"""

from __future__ import annotations

from rl.losses.api import LossInputs, PolicyLossOutput, register_policy_loss


@register_policy_loss("reinforce", default_aggregation="sequence_mean_token_sum")
def reinforce(inputs: LossInputs) -> PolicyLossOutput:
    """-A log pi. No ratio and no clipping, so it is the policy gradient only in the first optimizer step of a batch;
    for several use `cispo` or `ppo_clip`."""
    log_ratio = inputs.log_ratio().detach()
    metrics = {"ratio_mean": log_ratio.exp(), "kl_old": -log_ratio}
    return PolicyLossOutput(inputs.weighted(-inputs.advantages * inputs.logprobs), metrics)

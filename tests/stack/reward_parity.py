"""A reward that an untrained model meets about half of the time, so that every step has something to learn."""

from rewards.api import RewardInput


def parity(sample: RewardInput) -> float:
    """1 when the response's token ids add up to an even number."""
    return float(sum(sample.token_ids) % 2 == 0)

"""The math reward from response to number."""

from __future__ import annotations

import pytest

from rewards.api import GroundTruthError, RewardInput
from rewards.math import MathReward


@pytest.fixture(scope="module")
def reward():
    reward = MathReward(deadline_s=3.0)
    yield reward
    reward.close()


def score(reward, response, truth):
    return reward(RewardInput("", response, response, truth)).reward


@pytest.mark.parametrize(
    ("truth", "response", "expected"),
    [
        ("42", r"So \boxed{42}.", 1.0),
        ("42", r"So \boxed{41}.", 0.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1.0),
        (r"2\sqrt{3}", r"\boxed{2}", 0.0),
        ("7", "no answer here", 0.0),
    ],
)
def test_verdicts(reward, truth, response, expected):
    assert score(reward, response, truth) == expected


def test_hostile_answer_costs_only_its_own_reward(reward):
    assert score(reward, r"\boxed{9^{9^{9}}x}", "x") == 0.0
    assert score(reward, r"\boxed{x+x}", "2x") == 1.0


def test_empty_ground_truth_is_an_error_of_the_row(reward):
    with pytest.raises(GroundTruthError, match="ground truth"):
        reward.validate_ground_truth("  ", {})

"""An estimator that cannot be used is refused before a run starts."""

import pytest
import torch

from rl.advantages import advantage_spec
from rl.advantages.api import Advantages, AdvantageSpec, spread
from rl.advantages.contract import check_estimator
from rl.errors import ConfigError

BUILT_IN = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae")


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("group_size", [2, 5])
def test_our_own_pass(name, group_size):
    check_estimator(advantage_spec(name), {}, group_size=group_size)


def test_the_best_of_k_needs_groups_that_hold_k():
    check_estimator(advantage_spec("pass_at_k"), {"k": 4}, group_size=4)
    with pytest.raises(ConfigError, match="k is 4, but groups have at most 2 samples; lower k or raise group_size"):
        check_estimator(advantage_spec("pass_at_k"), {}, group_size=2)


def test_the_options_of_an_estimator_are_checked():
    with pytest.raises(ConfigError, match="does not take kk; it takes k"):
        check_estimator(advantage_spec("pass_at_k"), {"kk": 4}, group_size=4)
    with pytest.raises(ConfigError, match="algorithm.advantage grpo fails on a batch .* TypeError"):
        check_estimator(advantage_spec("grpo"), {"epsilon": "small"}, group_size=4)


def test_parts_of_the_reward_that_an_option_names_are_there():
    keys = {"gdpo_reward_keys": ["math", "format"]}
    check_estimator(advantage_spec("verl:gdpo"), keys, group_size=4)


@pytest.mark.parametrize(
    "parts", [lambda p: p["math"], lambda p: torch.stack(list(p.values())).sum(0), lambda p: p.get("math")]
)
def test_a_plugin_may_read_any_part_of_the_reward(parts):
    def function(inputs):
        return Advantages(spread(parts(inputs.reward_parts) * inputs.valid, inputs.lengths))

    check_estimator(AdvantageSpec("mine", function), {}, group_size=3)


def infinite_after_the_first_token(inputs):
    return Advantages(tuple((row + torch.arange(len(row)) / 0).nan_to_num(posinf=torch.inf) for row in inputs.values))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda inputs: Advantages(spread(inputs.rewards + 1, inputs.lengths)), "a sample that is not valid"),
        (lambda inputs: Advantages(tuple(inputs.rewards[:, None])), "one advantage per token"),
        (lambda inputs: Advantages(spread(inputs.rewards / 0, inputs.lengths)), "not finite"),
        (infinite_after_the_first_token, "not finite"),
        (lambda inputs: Advantages(spread(inputs.rewards[torch.tensor([99])], inputs.lengths)), "IndexError"),
    ],
)
def test_a_plugin_that_breaks_the_promise_is_refused(function, message):
    with pytest.raises(ConfigError, match=message):
        check_estimator(AdvantageSpec("mine", function), {}, group_size=4)

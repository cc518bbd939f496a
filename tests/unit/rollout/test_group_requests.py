"""The seeds of a step's samples."""

from rl.batch import Prompt
from rollout.workers import group_requests

PROMPTS = tuple(Prompt(f"p{i}", (i,), f"question {i}") for i in range(6))


def test_the_rounds_of_a_step_have_the_seeds_of_one_long_round():
    whole = group_requests(PROMPTS, group_size=3, seed=7, step=2)
    first = group_requests(PROMPTS[:4], group_size=3, seed=7, step=2)
    second = group_requests(PROMPTS[4:], group_size=3, seed=7, step=2, first_prompt=4)
    assert [g.seeds for g in first + second] == [g.seeds for g in whole]
    assert [g.prompt_index for g in second] == [0, 1]  # places within the batch, not within the step
    assert [g.prompt_ids for g in first + second] == [p.token_ids for p in PROMPTS]


def test_no_two_samples_of_neighbouring_steps_share_a_seed():
    seeds = [
        s for step in (-1, 0, 1) for g in group_requests(PROMPTS, group_size=4, seed=0, step=step) for s in g.seeds
    ]
    assert len(set(seeds)) == len(seeds) == 72
    assert all(0 <= seed < 2**31 for seed in seeds)

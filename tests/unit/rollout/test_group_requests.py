"""The seeds of a step's samples, and which worker draws them."""

import itertools
from types import SimpleNamespace

import pytest

from rl.batch import Prompt
from rl.config import RolloutConfig
from rl.errors import RolloutError
from rollout.pool import RolloutPool, group_requests
from rollout.workers import GroupRequest

PROMPTS = tuple(Prompt(f"p{i}", (i,), f"question {i}") for i in range(6))


def test_the_rounds_of_a_step_have_the_seeds_of_one_long_round():
    whole = group_requests(PROMPTS, group_size=3, seed=7, step=2)
    first = group_requests(PROMPTS[:4], group_size=3, seed=7, step=2)
    second = group_requests(PROMPTS[4:], group_size=3, seed=7, step=2, first_prompt=4)
    assert [g.seeds for g in first + second] == [g.seeds for g in whole]
    assert [g.prompt_index for g in second] == [0, 1]  # places within the batch, not within the step
    assert [g.prompt_ids for g in first + second] == [p.token_ids for p in PROMPTS]


def test_no_two_samples_of_neighbouring_steps_or_runs_share_a_seed():
    seeds = [
        s
        for seed, step in itertools.product((0, 1), (-1, 0, 1))
        for g in group_requests(PROMPTS, group_size=4, seed=seed, step=step)
        for s in g.seeds
    ]
    assert len(set(seeds)) == len(seeds) == 144
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_an_evaluation_shares_no_seed_with_the_first_step(monkeypatch):
    monkeypatch.setattr(RolloutPool, "_generate", lambda self, prompts, groups, *_: groups)
    pool = object.__new__(RolloutPool)  # without Ray's actors
    pool._seed, pool._evaluation_samples, pool._training, pool._evaluation = 7, 2, None, None
    trained, evaluated = pool.generate(PROMPTS, group_size=2, step=0), pool.generate_eval(PROMPTS)
    assert [len(g.seeds) for g in evaluated] == [2] * len(PROMPTS)
    assert not {s for g in trained for s in g.seeds} & {s for g in evaluated for s in g.seeds}


class FakeRay:
    """Calls are (worker, group); the newest is always ready first, or none ever is."""

    def __init__(self, monkeypatch, *, stuck=False, most=4):
        self.stuck, self.submitted, self.cancelled, self.in_flight = stuck, [], [], [0, 0]
        monkeypatch.setattr("rollout.pool.ray", SimpleNamespace(wait=self.wait, cancel=self.cancelled.append))
        monkeypatch.setattr(
            "rollout.pool.CREW", SimpleNamespace(get=lambda call, index, what: [[call[1].prompt_index]])
        )
        workers = {
            i: SimpleNamespace(generate=SimpleNamespace(remote=lambda groups, _, i=i: self.submit(i, *groups)))
            for i in range(2)
        }
        roster = SimpleNamespace(workers=workers, can_spare=lambda: False, raise_if_hung=lambda: None)
        config = RolloutConfig(max_concurrent_sequences=most, timeout_s=3)
        self.told = []
        self.pool = RolloutPool(roster, config, training=None, evaluation=None)
        self.pool.tell = self.told.append

    def submit(self, index, group):
        self.in_flight[index] += len(group.seeds)
        assert self.in_flight[index] <= 4, "a worker holds one engine's worth"
        self.submitted.append((index, group.prompt_index))
        return (index, group)

    def wait(self, calls, timeout):
        if self.stuck:
            return [], calls
        index, group = calls[-1]
        self.in_flight[index] -= len(group.seeds)
        return calls[-1:], calls[:-1]


def test_groups_go_to_the_idlest_worker_the_longest_prompt_first_and_come_back_in_order(monkeypatch):
    groups = [GroupRequest(i, (0,) * length, (i, i + 10)) for i, length in enumerate((1, 5, 3, 2, 4, 6))]
    fake = FakeRay(monkeypatch)
    made = []
    assert fake.pool._generate_balanced(groups, None, made.append) == [[i] for i in range(6)]
    assert sorted(made) == [[i] for i in range(6)]
    assert fake.submitted == [(0, 5), (1, 1), (0, 4), (1, 2), (1, 3), (1, 0)]
    assert fake.cancelled == []
    assert fake.told[0] == "0 of 6 prompts have their responses"
    assert fake.told[-2:] == ["5 of 6 prompts have their responses", "all 6 prompts have their responses"]


def test_workers_that_finish_nothing_in_time_are_named_and_their_calls_cancelled(monkeypatch):
    fake = FakeRay(monkeypatch, stuck=True)
    groups = [GroupRequest(i, (0,), (i, i + 10)) for i in range(6)]
    with pytest.raises(RolloutError, match=r"workers \[0, 1\] finished none of 4 groups within rollout.timeout_s 3"):
        fake.pool._generate_balanced(groups, None, lambda group: None)
    assert len(fake.cancelled) == 4


def test_a_group_larger_than_an_engine_is_drawn_all_the_same(monkeypatch):
    fake = FakeRay(monkeypatch, most=1)
    groups = [GroupRequest(i, (0,), (i, i + 10)) for i in range(3)]
    assert fake.pool._generate_balanced(groups, None, lambda group: None) == [[0], [1], [2]]

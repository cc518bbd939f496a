"""Splits are complete, balanced, deterministic and within the token budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.batch import TokenSequence, TrainBatch, TrainSample
from rl.batching import (
    balance,
    collect,
    micro_batches,
    plan_update,
    sequence_cost,
    shared_prefix_micro_batches,
    split_into_mini_batches,
)
from rl.errors import LearnerError

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def sample(num_tokens: int, *, masked: bool = False) -> TrainSample:
    """A sample of one prompt token and num_tokens - 1 response tokens."""
    r = num_tokens - 1
    return TrainSample(
        prompt_ids=np.zeros(1, dtype=np.int32),
        response_ids=np.zeros(r, dtype=np.int32),
        loss_mask=np.full(r, not masked),
        advantages=np.zeros(r, dtype=np.float32),
        rollout_logprobs=np.zeros(r, dtype=np.float32),
    )


def batch_of(lengths: list[int], masked: tuple[int, ...] = ()) -> TrainBatch:
    return TrainBatch.from_samples(tuple(sample(n, masked=i in masked) for i, n in enumerate(lengths)))


def test_bucketed_groups_weigh_padding_against_the_overhead_of_a_group() -> None:
    assert micro_batches([30, 8, 8, 7], 32, "bucketed") == [[0], [1, 2, 3]]
    assert micro_batches([6, 30, 8, 7], 160, "bucketed") == [[1], [2, 3, 0]]
    assert micro_batches([9, 10, 9, 10], 640, "bucketed") == [[1, 3, 0, 2]]
    assert micro_batches([30, 8, 8, 7], 120, "bucketed") == [[0], [1, 2, 3]]
    assert micro_batches([30, 8, 8, 7], 120, "bucketed", together=True) == [[0, 1, 2, 3]]
    assert micro_batches([30, 8, 8, 7], 119, "bucketed", together=True) == [[0], [1, 2, 3]]


@given(st.lists(st.integers(2, 60), min_size=1, max_size=8), st.integers(60, 200))
def test_bucketed_groups_are_the_cheapest(lengths: list[int], budget: int) -> None:
    ordered = sorted(lengths, reverse=True)

    def cost(groups: list[list[int]]) -> float:
        padded = [len(g) * max(g) for g in groups]
        return sum(padded) + len(groups) * (budget // 16) if max(padded) <= budget else float("inf")

    every = []
    for cuts in range(2 ** (len(ordered) - 1)):
        groups = [[ordered[0]]]
        for i, length in enumerate(ordered[1:]):
            if cuts >> i & 1:
                groups.append([length])
            else:
                groups[-1].append(length)
        every.append(cost(groups))
    found = [[lengths[i] for i in group] for group in micro_batches(lengths, budget, "bucketed")]
    assert cost(found) == min(every)


def test_long_tailed_lengths_need_half_the_positions_of_a_padded_shuffled_batch() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(128), 0.9, 128), 4, 1024).astype(int).tolist()
    budget = 8192
    size = budget // max(lengths)
    shuffled = sum(len(part) * max(part) for part in (lengths[i : i + size] for i in range(0, len(lengths), size)))
    groups = micro_batches(lengths, budget, "bucketed")
    assert 2 * sum(len(g) * max(lengths[i] for i in g) for g in groups) <= shuffled
    assert len(groups) <= len(lengths) / size


def test_packed_groups_are_first_fit_decreasing() -> None:
    assert micro_batches([3, 5, 1], 6, "packed") == [[1, 2], [0]]
    assert micro_batches([6, 5, 4, 3, 2], 10, "packed") == [[0, 2], [1, 3, 4]]


def test_no_sequences_make_no_groups() -> None:
    assert micro_batches([], 10, "packed") == micro_batches([], 10, "bucketed") == []


@given(LENGTHS, st.integers(60, 200), st.sampled_from(["packed", "bucketed"]))
def test_groups_hold_everything_once_within_the_budget(lengths: list[int], budget: int, layout: str) -> None:
    groups = micro_batches(lengths, budget, layout)  # type: ignore[arg-type]
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert (sum(sizes) if layout == "packed" else max(sizes) * len(sizes)) <= budget


def test_a_sequence_over_the_budget_is_an_error_with_the_remedy() -> None:
    with pytest.raises(LearnerError, match=r"sequence of 12 tokens .* raise it to at least 12"):
        micro_batches([3, 12], 10, "packed")


@given(LENGTHS, st.integers(1, 6))
def test_balance_deals_everything_to_all_ranks(lengths: list[int], ranks: int) -> None:
    samples = [sample(n) for n in lengths]
    shares = balance([s.tokens for s in samples], ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(samples)))
    assert all(shares) == (len(samples) >= ranks)


GROUPS = st.lists(st.tuples(st.integers(0, 4), st.integers(2, 30)), min_size=1, max_size=30)  # prompt, tokens after it


def siblings(made_of: list[tuple[int, int]]) -> list[TokenSequence]:
    """By the number of their prompt, which is 10 tokens long, and the length of their response."""
    return [TokenSequence(np.full(10, p, dtype=np.int32), np.zeros(n, dtype=np.int32)) for p, n in made_of]


@given(GROUPS, st.integers(1, 6))
def test_balance_keeps_equal_prompts_together_and_still_gives_every_rank_work(
    made_of: list[tuple[int, int]], ranks: int
) -> None:
    shares = balance(siblings(made_of), ranks, share_prefixes=True)
    assert sorted(i for share in shares for i in share) == list(range(len(made_of)))
    assert all(shares) == (len(made_of) >= ranks)


def test_balance_cuts_a_group_only_where_ranks_would_idle() -> None:
    """32 groups of 8 go to 2 ranks whole; one group of 8 goes to 2 ranks in halves."""
    shares = balance(siblings([(i // 8, 5 + i % 3) for i in range(256)]), 2, share_prefixes=True)
    prompts = [{i // 8 for i in share} for share in shares]
    assert not prompts[0] & prompts[1]
    assert [len(share) for share in balance(siblings([(0, 5)] * 8), 2, share_prefixes=True)] == [4, 4]


@given(GROUPS, st.integers(40, 120))
def test_shared_micro_batches_hold_everything_once_within_the_budget(
    made_of: list[tuple[int, int]], budget: int
) -> None:
    chosen = siblings(made_of)
    prompts = [s.prompt_key for s in chosen]
    groups = shared_prefix_micro_batches(prompts, [10] * len(chosen), [s.num_positions for s in chosen], budget)
    assert sorted(i for group in groups for i in group) == list(range(len(chosen)))
    sizes = [
        10 * len({prompts[i] for i in group}) + sum(chosen[i].num_positions - 10 for i in group) for group in groups
    ]
    assert max(sizes) <= budget


def test_shared_micro_batches_count_a_prompt_once() -> None:
    for budget in (9, 10):
        assert shared_prefix_micro_batches([b"x", b"y", b"x"], [4, 4, 4], [6, 9, 7], budget) == [[0, 2], [1]]
    assert shared_prefix_micro_batches([b"x", b"y", b"x"], [4, 4, 4], [6, 9, 7], 18) == [[0, 2, 1]]
    assert shared_prefix_micro_batches([b"x", b"y", b"z"], [1, 1, 1], [3, 5, 1], 6) == [[1, 2], [0]]
    with pytest.raises(LearnerError, match=r"sequence of 9 tokens .* raise it to at least 9"):
        shared_prefix_micro_batches([b"x", b"y"], [4, 4], [6, 9], 8)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=7), st.integers(1, 3))
def test_balance_stays_within_grahams_bound_of_the_optimum(lengths: list[int], ranks: int) -> None:
    """Longest first is within 4/3 - 1/(3 ranks) of the best split (Graham 1969, theorem 2), found by trying all."""
    costs = [sequence_cost(n) for n in lengths]
    best = min(
        max(sum(c for c, to in zip(costs, split, strict=True) if to == rank) for rank in range(ranks))
        for split in itertools.product(range(ranks), repeat=len(costs))
    )
    shares = balance([sample(n).tokens for n in lengths], ranks)
    ours = max(sum(costs[i] for i in share) for share in shares)
    assert ours <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-6


def test_attention_makes_long_sequences_cost_more_than_their_share() -> None:
    """24 H^2 n + 4 H n^2 FLOPs a layer, with H = 4096, in units of 24 H^2."""
    assert sequence_cost(6 * 4096) == 2 * 6 * 4096
    assert sequence_cost(2000) > 2 * sequence_cost(1000)


def test_balance_is_even_where_it_can_be() -> None:
    lengths = (50, 10, 40, 20, 30, 50)
    shares = balance([sample(n).tokens for n in lengths], 2)
    assert [sum(lengths[i] for i in share) for share in shares] == [100, 100]


@given(LENGTHS, st.integers(1, 5))
def test_what_is_dealt_is_collected_in_order(lengths: list[int], ranks: int) -> None:
    samples = [sample(n) for n in lengths]
    shares = balance([s.tokens for s in samples], ranks)
    results = [tuple(samples[i].rollout_logprobs + len(samples[i].response_ids) for i in share) for share in shares]
    sizes = [len(s.response_ids) for s in samples]
    collected = collect(results, shares, sizes)
    assert collected is not None
    assert [row.tolist() for row in collected] == [[n - 1.0] * (n - 1) for n in lengths]
    assert collect([None] * ranks, shares, sizes) is None
    for place, share in enumerate(shares):  # a sample that no rank had
        share[:], results[place] = share[1:], results[place][1:]
    dealt = {i for share in shares for i in share}
    partly = collect(results, shares, sizes)
    assert partly is not None
    assert [row.tolist() for row in partly] == [[(n - 1.0) * (i in dealt)] * (n - 1) for i, n in enumerate(lengths)]


def test_mini_batches_differ_by_one_sample_at_most_and_leave_out_what_teaches_nothing() -> None:
    batch = batch_of([5, 6, 7, 8, 9, 10, 11, 12], masked=(2,))
    parts = split_into_mini_batches(batch, 3, seed=1)
    assert sorted(len(p.samples) for p in parts) == [2, 2, 3]
    assert sorted(s.tokens.num_tokens for p in parts for s in p.samples) == [5, 6, 8, 9, 10, 11, 12]
    assert sum(p.num_loss_tokens for p in parts) == batch.num_loss_tokens
    assert [p.num_sequences for p in parts] == [len(p.samples) for p in parts]


def test_one_mini_batch_keeps_the_order() -> None:
    (part,) = split_into_mini_batches(batch_of([7, 5, 6]), 1, seed=9)
    assert [s.tokens.num_tokens for s in part.samples] == [7, 5, 6]


def test_every_epoch_sees_every_sample_once_in_another_order() -> None:
    batch = batch_of(list(range(4, 20)))
    plan = plan_update(batch, num_ranks=2, mini_batches=4, epochs=3, seed=5)
    assert [len(steps) for steps in plan] == [12, 12]
    epochs = []
    for epoch in range(3):
        steps = range(4 * epoch, 4 * epoch + 4)
        together = [sorted(s.tokens.num_tokens for rank in plan for s in rank[step].samples) for step in steps]
        assert sorted(n for part in together for n in part) == list(range(4, 20))
        epochs.append(together)
    assert epochs[0] != epochs[1] != epochs[2]


def test_two_mini_batches_are_drawn_anew_each_epoch() -> None:
    (steps,) = plan_update(batch_of(list(range(4, 20))), num_ranks=1, mini_batches=2, epochs=2)
    first, _, again, _ = [sorted(s.tokens.num_tokens for s in share.samples) for share in steps]
    assert first != list(range(4, 12)) and first != again


def test_ranks_share_the_denominators_of_the_whole_mini_batch() -> None:
    plan = plan_update(batch_of([4, 9, 5, 6, 30]), num_ranks=3, mini_batches=1)
    for (share,) in plan:
        assert (share.num_loss_tokens, share.num_sequences) == (3 + 8 + 4 + 5 + 29, 5)


def test_a_plan_is_the_same_for_the_same_seed() -> None:
    def lengths(seed: int) -> list[list[list[int]]]:
        plan = plan_update(batch_of(list(range(3, 40))), num_ranks=2, mini_batches=3, epochs=2, seed=seed)
        return [[[s.tokens.num_tokens for s in share.samples] for share in rank] for rank in plan]

    assert lengths(1) == lengths(1) != lengths(2)


def test_ranks_without_samples_get_an_empty_share() -> None:
    plan = plan_update(batch_of([4, 5]), num_ranks=3)
    assert sorted(len(rank[0].samples) for rank in plan) == [0, 1, 1]

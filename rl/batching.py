"""Split a batch of samples into mini-batches, ranks' shares, and micro-batches. Pure and deterministic.

Left out: tensors and padding (`rl.layouts`), and the forward pass (`rl.learner`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rl.batch import FloatArray, TokenSequence, TrainBatch, TrainSample
from rl.errors import LearnerError

Layout = Literal["packed", "bucketed", "shared_prefix"]

_HIDDEN_SIZE = 4096


@dataclass(frozen=True, slots=True)
class MiniBatchShare:
    """One rank's share of one optimizer step. The denominators are those of the whole mini-batch, over all ranks, so
    the loss does not depend on how the work is split."""

    samples: tuple[TrainSample, ...]
    num_loss_tokens: int
    num_sequences: int


def split_into_mini_batches(batch: TrainBatch, mini_batches: int, *, seed: int) -> list[TrainBatch]:
    """Shuffle and cut a batch into `mini_batches` parts whose sample counts differ by at most one.

    Samples without a loss token are left out: they would cost a forward pass and add nothing. A part is empty when
    fewer samples than parts are left. A single mini-batch keeps the order.
    """
    useful = [s for s in batch.samples if s.num_loss_tokens]
    order = np.arange(len(useful))
    if mini_batches > 1:
        order = np.random.default_rng(seed).permutation(len(useful))
    return [TrainBatch.from_samples(tuple(useful[i] for i in part)) for part in np.array_split(order, mini_batches)]


def sequence_cost(num_tokens: int) -> float:
    """Relative compute of one sequence: n (1 + n / 6H).

    A transformer layer costs about 24 H^2 FLOPs per token for its matrices, and 4 n H for attention over n tokens. H is
    a typical hidden size: balancing needs no exact costs.
    """
    return num_tokens * (1.0 + num_tokens / (6.0 * _HIDDEN_SIZE))


def balance(sequences: Sequence[TokenSequence], num_ranks: int, *, share_prefixes: bool = False) -> list[list[int]]:
    """The indices of each rank's sequences, dealt so that costs are about equal: costliest first, each to the least
    loaded rank.

    The largest load is at most 4/3 - 1/(3 num_ranks) times the best possible one (Graham 1969). Every rank gets work if
    there are at least as many sequences as ranks. With `share_prefixes`, sequences with the same prompt are dealt
    together, so that a rank computes the prompt once, but in pieces small enough to leave at least four per rank.
    """
    pieces = [[i] for i in range(len(sequences))]
    if share_prefixes:
        largest = max(1, len(sequences) // (4 * num_ranks))
        pieces = [
            members[start : start + largest]
            for members in _by_prompt([s.prompt_key for s in sequences])
            for start in range(0, len(members), largest)
        ]
    costs = [_cost_together([sequences[i] for i in piece]) for piece in pieces]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for number in sorted(range(len(pieces)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        shares[rank] += pieces[number]
        heapq.heappush(heap, (load + costs[number], rank))
    return [sorted(share) for share in shares]


def _by_prompt(prompts: Sequence[bytes]) -> list[list[int]]:
    """Indices grouped by equal prompts, in order of first appearance."""
    groups: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    return list(groups.values())


def _cost_together(sequences: Sequence[TokenSequence]) -> float:
    """`sequence_cost` of sequences that share their prompt."""
    prompt = sequence_cost(len(sequences[0].prompt_ids))
    return prompt + sum(sequence_cost(s.num_tokens) - prompt for s in sequences)


def collect(
    parts: Sequence[tuple[FloatArray, ...] | None], places: Sequence[Sequence[int]], lengths: Sequence[int]
) -> tuple[FloatArray, ...] | None:
    """Put the ranks' results back into the order of the samples.

    `lengths` are those of the samples; a sample that no rank had gets zeros. None if any rank has no results.
    """
    whole: dict[int, FloatArray] = {}
    for part, part_places in zip(parts, places, strict=True):
        if part is None:
            return None
        whole.update(zip(part_places, part, strict=True))
    return tuple(whole.get(i, np.zeros(length, dtype=np.float32)) for i, length in enumerate(lengths))


def plan_update(
    batch: TrainBatch,
    *,
    num_ranks: int,
    mini_batches: int = 1,
    epochs: int = 1,
    seed: int = 0,
    share_prefixes: bool = False,
) -> list[list[MiniBatchShare]]:
    """The whole update: each rank's share of each of the `epochs * mini_batches` optimizer steps.

    Each epoch shuffles anew, by `seed` and the epoch's number. `share_prefixes` affects which rank computes a sample,
    but not which mini-batch it belongs to.
    """
    plan: list[list[MiniBatchShare]] = [[] for _ in range(num_ranks)]
    for epoch in range(epochs):
        epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        for part in split_into_mini_batches(batch, mini_batches, seed=epoch_seed):
            shares = balance([s.tokens for s in part.samples], num_ranks, share_prefixes=share_prefixes)
            for rank, share in enumerate(shares):
                samples = tuple(part.samples[i] for i in share)
                plan[rank].append(MiniBatchShare(samples, part.num_loss_tokens, part.num_sequences))
    return plan


def micro_batches(
    lengths: Sequence[int], max_tokens: int, layout: Literal["packed", "bucketed"], *, together: bool = False
) -> list[list[int]]:
    """Group sequences so that no group holds more than `max_tokens` positions, padding included.

    bucketed: sequences of similar length together; a group of k sequences costs k times its longest one, plus an
    overhead of max_tokens / 16. The total cost is minimal.
    packed: first-fit decreasing; a group costs the sum of its lengths.
    together: a single group if all sequences fit, even if several groups would be cheaper.

    Bucketed groups come longest first, packed ones fullest first, so that ranks in lockstep run groups of similar cost.

    Example: `micro_batches([30, 8, 8, 7], 32, "bucketed")` is `[[0], [1, 2, 3]]`, with one position of padding;
    `micro_batches([3, 5, 1], 6, "packed")` is `[[1, 2], [0]]`.

    Raises:
        LearnerError: a sequence is longer than `max_tokens`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order:
        _check_fits(lengths[order[0]], max_tokens)
        if together and len(order) * lengths[order[0]] <= max_tokens:
            return [order]
    return (_bucket if layout == "bucketed" else _pack)(order, lengths, max_tokens)


def shared_prefix_micro_batches(
    prompts: Sequence[bytes], prompt_lengths: Sequence[int], lengths: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Like packed `micro_batches`, but a group holds each of its distinct prompts only once.

    Sequences with the same prompt stay together as long as they fit.

    Example with two sequences of one prompt of 4 positions and one of another:
    `shared_prefix_micro_batches([b"x", b"y", b"x"], [4, 4, 4], [6, 9, 7], 10)` is
    `[[0, 2], [1]]`, groups of 4 + 2 + 3 and of 9 positions.

    Raises:
        LearnerError: a sequence is longer than `max_tokens`.
    """
    pieces: list[list[int]] = []
    sizes: list[int] = []
    for members in _by_prompt(prompts):
        prompt, size = prompt_lengths[members[0]], max_tokens + 1
        for index in members:
            own = lengths[index] - prompt
            _check_fits(prompt + own, max_tokens)
            if size + own > max_tokens:
                pieces.append([])
                sizes.append(0)
                size = prompt
            pieces[-1].append(index)
            size += own
            sizes[-1] = size
    order = sorted(range(len(pieces)), key=lambda i: (-sizes[i], i))
    return [[index for piece in group for index in pieces[piece]] for group in _pack(order, sizes, max_tokens)]


def _check_fits(length: int, max_tokens: int) -> None:
    if length > max_tokens:
        raise LearnerError(
            f"a sequence of {length} tokens does not fit learner.max_tokens_per_microbatch {max_tokens}; "
            f"raise it to at least {length}"
        )


def _bucket(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut the sorted sequences into groups with the least sum of padded costs and overheads (dynamic programming)."""
    overhead = max_tokens // 16
    least = [0.0] * (len(order) + 1)  # least[i]: cost of the first i sequences
    cut = [0] * (len(order) + 1)  # where the last group of that solution starts
    for end in range(1, len(order) + 1):
        least[end] = float("inf")
        for start in range(end - 1, -1, -1):
            padded = (end - start) * lengths[order[start]]
            if padded > max_tokens:
                break
            if least[start] + padded + overhead < least[end]:
                least[end], cut[end] = least[start] + padded + overhead, start
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(list(order[cut[end] : end]))
        end = cut[end]
    return groups[::-1]


def _pack(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing, fullest bin first."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index in order:
        slot = next((i for i, space in enumerate(free) if space >= lengths[index]), None)
        if slot is None:
            bins.append([index])
            free.append(max_tokens - lengths[index])
        else:
            bins[slot].append(index)
            free[slot] -= lengths[index]
    return [bins[i] for i in sorted(range(len(bins)), key=lambda i: (free[i], i))]

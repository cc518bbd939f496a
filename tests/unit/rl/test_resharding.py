"""A shard that is put together from other ranks' files equals the one that its rank would have written."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.resharding import WrittenShards, frozen_parts, sizes


def written(tensors, groups, owners, rank, ranks, keys):
    """DeepSpeed's state of one rank, straight from the whole tensors: {name: {key: [elements]}}."""

    def flat(group, key):
        parts = []
        for name, elements in group:
            padded = torch.zeros(-(-elements // ranks) * ranks)
            padded[:elements] = tensors[name][key]
            parts.append(padded.chunk(ranks)[rank])
        return torch.cat(parts)

    return {
        "zero_stage": 3,
        "partition_count": ranks,
        "fp32_flat_groups": [flat(group, "master") for group in groups],
        "optimizer_state_dict": {
            "state": {
                index: {"step": torch.tensor(7.0), "momentum_buffer": None} | {key: flat(group, key) for key in keys}
                for index, group in enumerate(groups)
                if keys
            },
            "param_groups": [
                {"lr": 0.1 * number, "params": [i for i, owner in enumerate(owners) if owner == number]}
                for number in range(2)
            ],
        },
    }


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@st.composite
def divided(draw, kinds):
    """The parameters of each of the optimizer's groups, cut into sub-groups; and which group each one belongs to."""
    groups, owners = [], []
    for number, parameters in enumerate(kinds):
        cuts = sorted(draw(st.sets(st.integers(1, len(parameters) - 1)))) if len(parameters) > 1 else []
        for begin, end in zip([0, *cuts], [*cuts, len(parameters)], strict=True):
            groups.append(parameters[begin:end])
            owners.append(number)
    return groups, owners


@given(st.data())
def test_any_division_is_put_together_from_any_other(data):
    kinds = []
    for number in range(2):
        elements = data.draw(st.lists(st.integers(1, 13), min_size=1, max_size=5))
        kinds.append([(f"{number}.{i}", count) for i, count in enumerate(elements)])
    keys = data.draw(st.sampled_from([(), ("exp_avg", "exp_avg_sq")]))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: {key: torch.randn(count, generator=generator) for key in ("master", *keys)}
        for kind in kinds
        for name, count in kind
    }
    writers, readers = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    (old, old_owners), (new, new_owners) = data.draw(divided(kinds)), data.draw(divided(kinds))
    shards = WrittenShards([written(tensors, old, old_owners, r, writers, keys) for r in range(writers)], old)
    for rank in range(readers):
        found = shards.shard(new, new_owners, rank=rank, ranks=readers)
        assert equal(found, written(tensors, new, new_owners, rank, readers, keys))


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 5))
def test_parameters_that_are_not_trained_are_divided_anew_too(elements, writers, readers):
    whole = torch.arange(1.0, elements + 1)

    def part(rank, ranks):
        padded = torch.zeros(-(-elements // ranks) * ranks)
        padded[:elements] = whole
        return padded.chunk(ranks)[rank]

    models = [
        {"frozen_param_fragments": {"router": part(rank, writers)}, "frozen_param_shapes": {"router": whole.shape}}
        for rank in range(writers)
    ]
    for rank in range(readers):
        assert torch.equal(frozen_parts(models, rank=rank, ranks=readers)["router"], part(rank, readers))


def test_all_parameters_may_be_trained():
    assert frozen_parts([{"frozen_param_fragments": None}] * 2, rank=0, ranks=1) is None


def test_sizes_are_those_of_the_recorded_shapes():
    assert sizes([{"a": torch.Size([2, 3]), "b": torch.Size([])}, {"c": torch.Size([4])}]) == [
        [("a", 6), ("b", 1)],
        [("c", 4)],
    ]


def test_what_was_read_keeps_no_file_open():
    """DeepSpeed keeps the number of steps as it is; a tensor of the file's own memory would hold the file."""
    step = torch.tensor(3.0)
    shard = {
        "fp32_flat_groups": [torch.ones(4)],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{"params": [0]}]},
    }
    found = WrittenShards([shard], [[("a", 4)]]).shard([[("a", 4)]], [0], rank=0, ranks=1)
    kept = found["optimizer_state_dict"]["state"][0]["step"]
    assert kept == step and kept.data_ptr() != step.data_ptr()

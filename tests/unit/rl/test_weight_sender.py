"""Digests, buckets, the weight source and the sender, without an engine: a fake client maps the buckets itself."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from launch.tiny_models import FAMILIES, build_tiny_model
from rl.errors import BrokenSyncError, ConfigError, WeightSyncError
from rl.weight_sync.api import ParameterInfo, check_digests, resolve_transport
from rl.weight_sync.buckets import SharedBucket, open_bucket, plan_buckets
from rl.weight_sync.digest import digest
from rl.weight_sync.sender import WeightSender
from rl.weight_sync.source import Zero3WeightSource

# ---- digests ----


def reference_digest(tensor: torch.Tensor) -> int:
    """The same function in plain Python integers, word by word."""
    import hashlib

    mask = (1 << 64) - 1
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
    data += b"\0" * (-len(data) % 8)
    text = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    total = seed
    for i in range(len(data) // 8):
        x = int.from_bytes(data[8 * i : 8 * i + 8], "little") ^ ((seed + (i + 1) * 0x9E3779B97F4A7C15) & mask)
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        total += x ^ (x >> 31)
    return total & mask


@given(st.lists(st.floats(width=32), max_size=40), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_digest_equals_the_definition(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values).nan_to_num().clamp(-100, 100).to(dtype)
    assert digest(tensor) == reference_digest(tensor)


def test_digest_does_not_depend_on_chunks_or_memory_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(257, 33)
    whole = digest(tensor)
    assert digest(tensor.t().contiguous().t()) == whole
    even = tensor[:256]  # whole words; and an unaligned view of each
    for part in (tensor, even):
        assert digest(torch.cat((torch.zeros(1), part.flatten()))[1:].view(part.shape)) == digest(part)
    monkeypatch.setattr("rl.weight_sync.digest._CHUNK_WORDS", 100)
    assert digest(tensor) == whole


@given(st.integers(0, 63), st.integers(0, 63), st.integers(0, 31), st.integers(0, 31))
@settings(max_examples=200)
def test_digest_sees_flipped_bits_also_two_equal_ones(i: int, j: int, a: int, b: int) -> None:
    tensor = torch.arange(64, dtype=torch.int32)
    changed = tensor.clone()
    changed[i] ^= torch.tensor(1 << a).to(torch.int32)
    changed[j] ^= torch.tensor(1 << b).to(torch.int32)
    assert (digest(changed) == digest(tensor)) == torch.equal(changed, tensor)


def test_digest_sees_order_shape_and_dtype() -> None:
    tensor = torch.randn(4, 8, 16)
    assert digest(tensor[[1, 0, 2, 3]]) != digest(tensor)
    assert digest(tensor.view(8, 4, 16)) != digest(tensor)
    assert digest(tensor.view(torch.int32)) != digest(tensor)
    assert digest(torch.zeros(3)) != digest(torch.zeros(4))
    assert digest(torch.zeros(0)) != digest(torch.zeros(0, 2))


def test_verdict_names_engine_version_and_parameters() -> None:
    check_digests(3, {"a": 1}, {0: {"a": 1}, 1: {"a": 1}})
    with pytest.raises(
        WeightSyncError, match=r"version 3 .* 1 of 2 engines: engine 3 \(missing: c; different: b; extra: z"
    ):
        check_digests(3, {"a": 1, "b": 2, "c": 3}, {0: {"a": 1, "b": 2, "c": 3}, 3: {"a": 1, "b": 7, "z": 3}})


@pytest.mark.parametrize(
    ("transport", "cuda", "colocate", "expected"),
    [
        ("auto", False, True, "shm"),
        ("auto", True, False, "nccl"),
        ("auto", True, True, "ipc"),
        ("shm", True, True, "shm"),
    ],
)
def test_transport_follows_the_devices(transport: Any, cuda: bool, colocate: bool, expected: str) -> None:
    assert resolve_transport(transport, cuda=cuda, colocate=colocate) == expected


@pytest.mark.parametrize(
    ("transport", "cuda", "colocate", "message"),
    [
        ("nccl", False, False, "nccl needs separate GPUs .* has no GPUs; set it to auto"),
        ("ipc", False, True, "ipc needs learners and engines on the same GPUs .* has no GPUs"),
        ("ipc", True, False, "but this run has GPUs that learners and engines do not share"),
        ("nccl", True, True, "but this run has ray.colocate"),
    ],
)
def test_a_transport_that_cannot_work_is_refused(transport: Any, cuda: bool, colocate: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_transport(transport, cuda=cuda, colocate=colocate)


# ---- buckets ----


def info(name: str, *shape: int) -> ParameterInfo:
    return ParameterInfo(name, torch.float32, shape)


def test_buckets_keep_order_and_bound_and_give_a_large_tensor_one_of_its_own() -> None:
    parameters = [info("a", 4), info("b", 16), info("big", 1000), info("c", 1), info("d", 16)]
    plans = plan_buckets(parameters, bucket_bytes=128)
    assert [[p.name for p in plan.parameters] for plan in plans] == [["a", "b"], ["big"], ["c", "d"]]
    assert [plan.offsets for plan in plans] == [(0, 64), (0,), (0, 64)]
    assert [plan.num_bytes for plan in plans] == [128, 4032, 128]


def test_bucket_carries_bits_and_outlives_the_sender() -> None:
    tensors = {
        "weight": torch.randn(3, 5).t(),
        "half": torch.randn(7).to(torch.bfloat16),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(1.5),
    }
    (plan,) = plan_buckets([ParameterInfo(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], 1 << 20)
    bucket = SharedBucket(plan)
    for name, tensor in tensors.items():
        bucket.put(name, tensor)
    received = dict(open_bucket(bucket.update_info()))
    bucket.close()
    assert received.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(received[name], tensor) and received[name].dtype == tensor.dtype
    received["weight"].zero_()  # a loader may scribble: the mapping is private


def test_bucket_refuses_another_tensor_than_planned() -> None:
    (plan,) = plan_buckets([info("a", 4)], 1 << 20)
    bucket = SharedBucket(plan)
    with pytest.raises(WeightSyncError, match=r"yielded a torch.float32 \(5,\) where its metadata says a"):
        bucket.put("a", torch.zeros(5))
    bucket.close()
    with pytest.raises(WeightSyncError, match="cannot map weight bucket 0"):
        open_bucket(bucket_info_of_a_lost_sender(plan))


def bucket_info_of_a_lost_sender(plan: Any) -> dict[str, Any]:
    bucket = SharedBucket(plan)
    lost = bucket.update_info() | {"pid": 2**22 + 1}  # above pid_max
    bucket.close()
    return lost


# ---- source ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_source_yields_what_a_checkpoint_holds(family: Any, tied: bool, tmp_path: Path) -> None:
    path = build_tiny_model(family, tmp_path, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with safe_open(path / "model.safetensors", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    source = Zero3WeightSource(model, dtype=torch.float32, bucket_bytes=10_000)
    received = dict(source)
    assert received.keys() == expected.keys()
    assert all(torch.equal(received[name], expected[name]) for name in expected)
    assert ("lm_head.weight" in received) != tied
    assert [(p.name, p.shape) for p in source.metadata()] == [(n, tuple(t.shape)) for n, t in source]


def test_source_casts_to_the_wire_type_and_keeps_data_on_the_sender_only(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model("qwen3", tmp_path), dtype=torch.float32)
    source = Zero3WeightSource(model, dtype=torch.bfloat16, bucket_bytes=1 << 20)
    name, tensor = next(iter(source))
    assert torch.equal(tensor, model.get_parameter(name).to(torch.bfloat16))
    assert {p.dtype for p in source.metadata()} == {torch.bfloat16}
    assert list(Zero3WeightSource(model, dtype=torch.bfloat16, bucket_bytes=1 << 20, rank=1)) == []
    everywhere = Zero3WeightSource(model, dtype=torch.bfloat16, bucket_bytes=1 << 20, rank=1, keep="all")
    assert len(list(everywhere)) == len(source.metadata())


# ---- sender ----


class ListSource:
    """A source of given tensors that counts how often it was walked to its end."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.ends = 0

    def metadata(self) -> list[ParameterInfo]:
        return [ParameterInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()
        self.ends += 1


class FakeEngines:
    """A client over one engine that maps and digests buckets as the real receiver does."""

    def __init__(self) -> None:
        self.received: dict[str, int] = {}
        self.calls: list[str] = []
        self.most_alive = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")

    def start_weight_update(self) -> None:
        self.calls.append("start")
        self.received = {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append("update")
        self.most_alive = max(self.most_alive, len(set(open_bucket_files())))  # mmap holds a second descriptor
        self.received |= {name: digest(tensor) for name, tensor in open_bucket(update_info)}

    def finish_weight_update(self, policy_version: int) -> dict[int, dict[str, int]]:
        self.calls.append("finish")
        return {0: self.received}

    def late(self) -> str:
        return "rollout workers [1] have not answered"


def open_bucket_files() -> list[str]:
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except FileNotFoundError:  # closed meanwhile by another thread
            continue
    return [link for link in links if "fledge-bucket" in link]


def some_tensors() -> dict[str, torch.Tensor]:
    return {f"layers.{i}": torch.randn(64) for i in range(10)}


def test_sender_proves_what_arrived_and_leaves_no_bucket() -> None:
    engines, source = FakeEngines(), ListSource(some_tensors())
    sender = WeightSender(source, "shm", engines, bucket_bytes=512)
    version = sender.send(4)
    assert version.policy_version == 4 and version.num_bytes == 10 * 256
    assert engines.received == {name: digest(tensor) for name, tensor in source.tensors.items()}
    assert engines.calls == ["init", "start", *["update"] * 5, "finish"]
    assert engines.most_alive <= 2
    assert open_bucket_files() == []
    sender.send(5)
    assert engines.calls.count("init") == 1


def test_weights_that_arrive_otherwise_than_sent_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = FakeEngines()
    sender = WeightSender(ListSource(some_tensors()), "shm", engines, bucket_bytes=512)
    monkeypatch.setattr(engines, "finish_weight_update", lambda _: {0: {**engines.received, "layers.7": 1}})
    with pytest.raises(WeightSyncError, match=r"version 6 .*engine 0 \(different: layers\.7\)"):
        sender.send(6)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_has_the_verdict_of_the_first(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks; what rank 0 says is what the broadcast brings."""
    verdicts: list[tuple[Any, Any]] = [("the proof of rank 0", None), (None, WeightSyncError("rank 0: engine 3 died"))]

    def broadcast(objects: list[Any], src: int) -> None:
        assert src == 0
        objects[0] = verdicts.pop(0)

    monkeypatch.setattr("rl.weight_sync.sender.dist.broadcast_object_list", broadcast)
    sender = WeightSender(ListSource(some_tensors()), "shm", FakeEngines(), rank=rank, world_size=2)
    sender._connected = True
    assert sender.send(1) == "the proof of rank 0"
    with pytest.raises(WeightSyncError, match="rank 0: engine 3 died"):
        sender.send(2)


def test_a_rank_that_fails_alone_raises_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(ListSource):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            raise WeightSyncError("rank 1: cannot gather layers.3")

    def broadcast(objects: list[Any], src: int) -> None:
        objects[0] = ("the proof of rank 0", None)

    monkeypatch.setattr("rl.weight_sync.sender.dist.broadcast_object_list", broadcast)
    sender = WeightSender(Fails(some_tensors()), "shm", FakeEngines(), rank=1, world_size=2)
    with pytest.raises(WeightSyncError, match="rank 1: cannot gather"):
        sender.send(1)


def test_every_gpu_of_every_engine_has_a_place_in_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    for name in ("NcclTransport", "IpcTransport"):
        monkeypatch.setattr(
            f"rl.weight_sync.gpu_transports.{name}",
            lambda *given, n=name, **named: made.append((n, *given[5:], *named.values())),
        )
    for transport in ("nccl", "ipc"):
        WeightSender(
            ListSource({}), transport, FakeEngines(), num_engines=3, tensor_parallel_size=2, address="10.0.0.7"
        )
    for rank in (2, 3):  # engine i is beside learner i
        WeightSender(ListSource({}), "ipc", FakeEngines(), rank=rank, world_size=5, num_engines=3)
    ipc = [("IpcTransport", has_engine) for has_engine in (True, True, False)]
    assert made == [("NcclTransport", 7, [1, 3, 5], "10.0.0.7"), *ipc]


@pytest.mark.parametrize("broken", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_failing_engine_is_an_error_after_the_source_was_walked(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, source = FakeEngines(), ListSource(some_tensors())

    def fail(*_: Any) -> None:
        error = RuntimeError("engine 3 is gone")
        error.add_note("the traceback of its process")
        raise error

    monkeypatch.setattr(engines, broken, fail)
    with pytest.raises(
        WeightSyncError, match=r"rank 0: .* of policy version 1 failed: RuntimeError: engine 3 is gone"
    ) as caught:
        WeightSender(source, "shm", engines, bucket_bytes=512).send(1)
    assert pickle.loads(pickle.dumps(caught.value)).__notes__ == ["the traceback of its process"]
    assert source.ends == 1  # other ranks gather with this one: it may not leave early
    assert open_bucket_files() == []


def test_late_engine_is_an_error_that_names_rank_bucket_and_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    engines, release = FakeEngines(), threading.Event()
    monkeypatch.setattr(engines, "update_weights", lambda _: release.wait())
    with pytest.raises(
        WeightSyncError,
        match=r"loading bucket 0 \(layers.0 to layers.1\) of policy version 1 .*0\.1 s .*workers \[1\] have",
    ):
        WeightSender(ListSource(some_tensors()), "shm", engines, bucket_bytes=512, timeout_s=0.1).send(1)
    release.set()


def test_source_that_disagrees_with_its_metadata_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ListSource(some_tensors())
    sender = WeightSender(source, "shm", FakeEngines(), bucket_bytes=512)
    source.tensors = source.tensors | {"extra": torch.zeros(1)}
    with pytest.raises(WeightSyncError, match="yielded extra, which is beyond its metadata"):
        sender.send(1)
    source.tensors = {"layers.0": torch.zeros(64)}
    with pytest.raises(WeightSyncError, match=r"ended before the last parameter of bucket 0"):
        sender.send(1)


def test_other_ranks_only_walk_the_source() -> None:
    engines, source = FakeEngines(), ListSource(some_tensors())
    sender = WeightSender(source, "shm", engines, rank=1)
    assert sender.send(2).num_bytes == 0
    assert engines.calls == [] and source.ends == 1


@pytest.mark.parametrize(("error", "told"), [(BrokenSyncError, False), (WeightSyncError, True)])
def test_a_broken_sync_is_not_told_to_ranks_that_may_be_in_a_gather(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], told: bool
) -> None:
    """They would meet the verdict's broadcast with another collective, and all would wait for the group's time-out."""
    broadcasts: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda verdict, src: broadcasts.append(verdict))

    class Breaks:
        def connect(self) -> None: ...
        def close(self) -> None: ...
        def send(self, policy_version: int) -> Any:
            raise error("engine 1 is dead")

    source = SimpleNamespace(metadata=list)
    sender = WeightSender(source, "shm", None, world_size=2)  # type: ignore[arg-type]
    sender._transport = Breaks()
    sender._connected = True
    with pytest.raises(error, match="engine 1 is dead"):
        sender.send(1)
    assert bool(broadcasts) == told

"""Weight sync into real engines: exact for every parameter group, proven by digests, and loud when it goes wrong.

One engine start per family. The order within the file matters where it says so: the last tests end their engines.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engine_rig import PROMPT, EngineRig, LoopClient
from mxfp4 import write_mxfp4

from launch.tiny_models import FAMILIES
from rl.batch import FinishReason
from rl.errors import RolloutError, WeightSyncError
from rl.weight_sync.sender import WeightSender
from rollout.engine import GenerationRequest, GenerationResult, SamplingParameters
from rollout.reload_mends import CPU_EXPERTS, CPU_TIED_HEAD, GPT_OSS_EXPERTS, GPT_OSS_SINKS

pytestmark = pytest.mark.stack

EXACT = 1e-4  # float32, two implementations
VISIBLE = 1e-3  # what a skipped update must exceed, so that the tests can fail

# family -> mend -> (what is switched off to see its fault, the parameters that then stay stale). Without the mend for
# GPT-OSS's experts nothing packs them again, so the mend that removes their packed form must not run either.
MENDS = {
    "qwen3": {CPU_TIED_HEAD: ({CPU_TIED_HEAD}, "embed_tokens")},
    "qwen3_moe": {CPU_EXPERTS: ({CPU_EXPERTS}, "experts")},
    "gpt_oss": {
        CPU_EXPERTS: ({CPU_EXPERTS}, "experts"),
        GPT_OSS_EXPERTS: ({GPT_OSS_EXPERTS, CPU_EXPERTS}, "experts"),
        GPT_OSS_SINKS: ({GPT_OSS_SINKS}, "sinks"),
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRig]:
    rig = EngineRig(request.param, tmp_path_factory.mktemp(request.param))
    yield rig
    rig.close()


@pytest.fixture
def qwen3(rig: EngineRig) -> EngineRig:
    if rig.family != "qwen3":
        pytest.skip("one family is enough")
    return rig


def test_every_parameter_group_arrives_exactly(rig: EngineRig) -> None:
    rig.check_following(EXACT, VISIBLE)


def test_every_mend_is_still_needed(rig: EngineRig) -> None:
    for mend, (switched_off, part) in MENDS[rig.family].items():
        wrong = rig.difference_without(switched_off, part)
        assert rig.difference() < EXACT
        assert wrong > VISIBLE, f"vLLM no longer needs the mend {mend!r} on {rig.family}: delete this mend"


def test_rollout_logprobs_are_those_of_the_processed_distribution(rig: EngineRig) -> None:
    prompt = rig.token_ids[0, :PROMPT]
    results = generate(rig, SamplingParameters(max_tokens=24, temperature=0.7, top_k=20, ignore_eos=True), 4)
    assert len({r.token_ids.tobytes() for r in results}) > 1  # seeds differ
    for result in results:
        response = torch.from_numpy(result.token_ids).long()
        logits = rig.reference_logits(torch.cat((prompt, response)))[PROMPT - 1 : -1] / 0.7
        kept = logits >= logits.topk(20).values[:, -1:]
        logprobs = torch.log_softmax(logits.where(kept, -torch.inf), -1).gather(-1, response[:, None])[:, 0]
        assert np.abs(result.logprobs - logprobs.numpy()).max() < EXACT
        assert (result.finish_reason, result.policy_version) == (FinishReason.LENGTH, rig.version)
    again = generate(rig, SamplingParameters(max_tokens=24, temperature=0.7, top_k=20, ignore_eos=True), 4)
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in results]


def test_greedy_follows_the_model_and_a_stop_token_ends_a_response(qwen3: EngineRig) -> None:
    (result,) = generate(qwen3, SamplingParameters(max_tokens=6, temperature=0.0, ignore_eos=True), 1)
    row = torch.cat((qwen3.token_ids[0, :PROMPT], torch.from_numpy(result.token_ids).long()))
    assert result.token_ids.tolist() == qwen3.reference_logits(row)[PROMPT - 1 : -1].argmax(-1).tolist()
    stop = int(result.token_ids[2])
    (stopped,) = generate(qwen3, SamplingParameters(max_tokens=6, temperature=0.0, stop_token_ids=(stop,)), 1)
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids.tolist() == result.token_ids.tolist()[: result.token_ids.tolist().index(stop) + 1]


def test_sync_with_generation_in_flight(qwen3: EngineRig) -> None:
    old_version = qwen3.version
    first_logprobs = qwen3.reference_logits(qwen3.token_ids[0, :PROMPT])[-1].log_softmax(-1)
    parameters = SamplingParameters(max_tokens=400, ignore_eos=True)
    running = asyncio.run_coroutine_threadsafe(qwen3.engine.generate(requests(qwen3, 4), parameters), qwen3.loop)
    wait_until(lambda: len(generated(qwen3)) == 4 and min(generated(qwen3)) > 0)
    qwen3.perturb("mlp")
    qwen3.sync()
    for result in running.result(120):
        assert result.finish_reason is FinishReason.LENGTH and len(result.token_ids) == 400
        assert (result.policy_version, result.last_policy_version) == (old_version, qwen3.version)
        assert result.logprobs[0] == pytest.approx(float(first_logprobs[result.token_ids[0]]), abs=EXACT)
        # Keys and values from before the sync would show here: the last token sees all of its context.
        row = torch.cat((qwen3.token_ids[0, :PROMPT], torch.from_numpy(result.token_ids).long()))
        assert result.logprobs[-1] == pytest.approx(float(qwen3.reference_logprobs(row)[-1]), abs=EXACT)


def test_corrupted_bucket_is_named(qwen3: EngineRig) -> None:
    client = LoopClient(qwen3)

    def corrupt(info: dict[str, Any]) -> dict[str, Any]:
        if "model.norm.weight" in info["names"]:
            offset = info["offsets"][info["names"].index("model.norm.weight")]
            with Path(f"/proc/{info['pid']}/fd/{info['fd']}").open("r+b") as file:
                file.seek(offset + 5)
                byte = file.read(1)[0]
                file.seek(offset + 5)
                file.write(bytes([byte ^ 1]))
        return info

    client.intercept = corrupt
    with pytest.raises(WeightSyncError, match=r"version 77 .*engine 0 \(different: model\.norm\.weight\)"):
        WeightSender(qwen3.source(), "shm", client, bucket_bytes=1 << 16).send(77)
    qwen3.sync()
    assert qwen3.difference() < EXACT


def test_lost_bucket_is_named(qwen3: EngineRig) -> None:
    client = LoopClient(qwen3)
    client.intercept = lambda info: None if "model.norm.weight" in info["names"] else info
    with pytest.raises(WeightSyncError, match=r"version 78 .*engine 0 \(missing: .*model\.norm\.weight"):
        WeightSender(qwen3.source(), "shm", client, bucket_bytes=1 << 16).send(78)
    with pytest.raises(WeightSyncError, match="was told to serve policy version 77"):
        qwen3.run(qwen3.engine.activate(77))
    qwen3.sync()
    with pytest.raises(WeightSyncError, match=rf"version {qwen3.version + 1}, but .* finished is '{qwen3.version}'"):
        qwen3.run(qwen3.engine.activate(qwen3.version + 1))  # nothing was sent at all


def test_update_that_was_cut_short_can_be_started_again(rig: EngineRig) -> None:
    client, passed = LoopClient(rig), iter(range(2))

    def fail_third(info: dict[str, Any]) -> dict[str, Any]:
        if next(passed, None) is None:
            raise ConnectionError("another engine died")
        return info

    client.intercept = fail_third
    with pytest.raises(WeightSyncError, match="another engine died"):
        WeightSender(rig.source(), "shm", client, bucket_bytes=1 << 14).send(79)
    rig.perturb("")
    rig.sync()
    assert rig.difference() < EXACT


# ---- from here on the engine does not survive: one way to end for each family ----


def test_engine_ends_as_it_should(rig: EngineRig) -> None:
    core = rig.core()
    assert watches(core, os.getpid()), "the engine core would outlive a killed parent"
    {"qwen3": kill_core, "qwen3_moe": stop_core, "gpt_oss": lambda rig: None}[rig.family](rig)
    rig.run(rig.engine.shutdown())
    assert not core.is_running()
    left = [
        child for child in psutil.Process().children(recursive=True) if "resource_tracker" not in str(child.cmdline())
    ]
    assert [c for c in left if "vllm" in c.name().lower() or "spawn_main" in str(c.cmdline())] == []
    with pytest.raises(RolloutError, match="engine 0 is not running"):
        generate(rig, SamplingParameters(max_tokens=1), 1)


def kill_core(rig: EngineRig) -> None:
    """A killed engine core fails the calls in flight, and health."""
    parameters = SamplingParameters(max_tokens=400, ignore_eos=True)
    running = asyncio.run_coroutine_threadsafe(rig.engine.generate(requests(rig, 4), parameters), rig.loop)
    wait_until(lambda: len(generated(rig)) == 4)
    rig.core().kill()
    with pytest.raises(RolloutError, match=r"engine 0 is dead"):
        running.result(60)
    with pytest.raises(RolloutError, match=r"engine 0 is dead"):
        rig.run(rig.engine.check_health(60))


def stop_core(rig: EngineRig) -> None:
    """A stopped engine core is not dead, but health notices, and a sync gives up at the client's deadline."""
    rig.run(rig.engine.check_health(60))
    rig.core().send_signal(signal.SIGSTOP)
    with pytest.raises(RolloutError, match=r"engine 0 has made no progress for 1 s"):
        rig.run(rig.engine.check_health(1))
    with pytest.raises(WeightSyncError, match=r"engine 0 did not answer init_weight_transfer in 1 s"):
        WeightSender(rig.source(), "shm", LoopClient(rig, timeout_s=1)).send(80)


def watches(process: psutil.Process, owner: int) -> bool:
    """Whether the process holds a pidfd of its owner (tests/unit/rollout/test_engine_process.py shows its effect)."""
    infos = Path(f"/proc/{process.pid}/fdinfo").iterdir()
    return any(f"Pid:\t{owner}\n" in info.read_text() for info in infos)


# ---- helpers ----


def requests(rig: EngineRig, count: int) -> list[GenerationRequest]:
    prompt = tuple(rig.token_ids[0, :PROMPT].tolist())
    return [GenerationRequest(prompt, seed) for seed in range(count)]


def generate(rig: EngineRig, parameters: SamplingParameters, count: int) -> list[GenerationResult]:
    return rig.run(rig.engine.generate(requests(rig, count), parameters))


def generated(rig: EngineRig) -> list[int]:
    """Tokens so far of each request in flight."""
    states = list(rig.engine._engine().output_processor.request_states.values())
    return [state.detokenizer.num_output_tokens() for state in states]


def wait_until(condition: Any, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_an_engine_of_a_quantised_checkpoint_takes_what_was_trained(tmp_path: Path) -> None:
    def quantized(path: Path) -> Path:
        write_mxfp4(path, tmp_path / "mxfp4")
        return tmp_path / "mxfp4"

    rig = EngineRig("gpt_oss", tmp_path / "model", engine_checkpoint=quantized)
    try:
        assert rig.difference() > VISIBLE
        rig.sync()
        assert rig.difference() < EXACT
    finally:
        rig.close()

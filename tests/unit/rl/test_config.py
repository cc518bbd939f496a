"""Composition and validation: every error names the key, the value and the remedy."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launch.preflight import check_algorithm
from rl.config import SftConfig, TrainConfig
from rl.config.loading import load_config, to_yaml
from rl.errors import ConfigError

MINIMAL = "model: {path: some/model}\ndata: {train: {path: data.jsonl}}\n"
CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("**/*.yaml"))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path):
    schema = SftConfig if "sft" in path.stem else TrainConfig
    config = load_config(path, [], schema)
    assert config.name
    if isinstance(config, TrainConfig):
        check_algorithm(config)


def test_the_quickstart_fits_on_one_gpu():
    """As the Makefile runs it after `make gpu`."""
    flags = re.search(r"RL_FLAGS := (.*)", (CONFIGS[0].parents[1] / "Makefile").read_text())
    assert flags is not None
    quickstart = CONFIGS[0].parent / "quickstart.yaml"
    config = load_config(quickstart, [*flags[1].split(), "device=cuda"], TrainConfig)
    assert (config.learner.num_workers, config.rollout.num_workers, config.ray.colocate) == (1, 1, True)


def test_the_resolved_config_loads_to_an_equal_one(config_file, tmp_path):
    config = load_config(config_file, ["learner.optimizer.lr=1e-5", "rollout.stop=[a,b]"], TrainConfig)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy, [], TrainConfig) == config
    assert config.rollout.stop == ("a", "b")


def test_a_run_is_as_long_as_its_steps_or_its_epochs_say(config_file):
    with pytest.raises(ConfigError, match="total_steps 50 and total_epochs 2 both set the length of the run"):
        load_config(config_file, ["total_steps=50", "total_epochs=2"], TrainConfig)
    overrides = ["total_steps=50", "total_epochs=2", "total_steps=null"]
    assert load_config(config_file, overrides, TrainConfig).total_epochs == 2.0


def test_numbers_without_end_come_back_from_the_resolved_config(config_file, tmp_path):
    config = load_config(config_file, ["reward.clip=[-.inf,1]", "rollout.engine_options.x=.inf"], TrainConfig)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    again = load_config(copy, [], TrainConfig)
    assert (again.reward.clip, again.rollout.engine_options["x"]) == ((-math.inf, 1.0), math.inf)


@given(text=st.text(alphabet="$\\{}a:.'# \n\x85\u2028\ufeff", max_size=8) | st.text(max_size=8))
@example("\x85")
@example("1e5")
@example("0x1_0")
@example("yes")
def test_any_text_comes_back_from_the_resolved_config(text):
    config = TrainConfig(model={"path": "m"}, data={"train": {"path": "d", "prompt_suffix": text}})
    plain = OmegaConf.to_container(OmegaConf.create(to_yaml(config)), resolve=True)
    assert TrainConfig.model_validate(plain) == config


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("Give the number after ####", "Give the number after ####"),
        ("item #1 only. Rank #2", "item #1 only. Rank #2"),
        (" Put your answer in \\boxed{}.", " Put your answer in \\boxed{}."),
        ("# Answer", "# Answer"),
        ("' in quotes '", " in quotes "),
        ('"a\\nline"', "a\nline"),
        ("null", ""),
        ("of ${name}", "of run"),
    ],
)
def test_a_text_on_the_command_line_is_what_was_typed(config_file, typed, text):
    config = load_config(config_file, ["name=run", f"data.train.prompt_suffix={typed}"], TrainConfig)
    assert config.data.train.prompt_suffix == text


def test_extends_overrides_interpolation_and_environment(tmp_path, config_file, monkeypatch):
    monkeypatch.setenv("FLEDGE_TEST_DIR", "/somewhere")
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: config.yaml\nname: child\nrun_dir: ${oc.env:FLEDGE_TEST_DIR}/${name}\nrollout: {group_size: 4}\n"
    )
    config = load_config(child, ["rollout.group_size=16", "name=mine"], TrainConfig)
    assert (config.name, config.run_dir, config.rollout.group_size) == ("mine", "/somewhere/mine", 16)
    assert config.model.path == "some/model"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_sise=3", "unknown key rollout.group_sise; did you mean group_size?"),
        ("zzz=1", "unknown key zzz; known keys here:.*rollout"),
        ("learner.optimizer.lr=-1", "learner.optimizer.lr is -1: input should be greater than 0"),
        ("rollout.top_p=1.5", "rollout.top_p is 1.5: input should be less than or equal to 1"),
        ("total_steps=true", "total_steps: it must be a number, not true or false"),
        (
            "data.eval=[{path: x, name: a/b}]",
            r"data: eval has a dataset with the name 'a/b', which becomes part of file names",
        ),
        ("rollout.group_size=many", "rollout.group_size is 'many': input should be a valid integer"),
        ("model.dtype=float16", "model.dtype is 'float16': input should be 'bfloat16' or 'float32'"),
        (
            "learner.mini_batches=7",
            "32 x rollout.group_size 8 = 256 samples cannot be divided evenly into learner.mini_batches 7; set it to a "
            "divisor of 256",
        ),
        ("learner.num_workers=300", "a mini-batch of 256 samples is too small for learner.num_workers 300"),
        ("learner.max_tokens_per_microbatch=100", "less than the longest sequence.*= 2048; raise it to at least 2048"),
        ("evaluation.pass_at=[8]", r"evaluation: pass_at holds \[8\] but samples_per_prompt is 1"),
        ("checkpoint.keep_best=eval/sums/pass@1", "evaluation.every is 0 and checkpoint.every 50; make the first a mu"),
        ("checkpoint={keep_best: a, keep: null}", "checkpoint.keep_best has no effect where checkpoint.keep null"),
        ("evaluation.every=5", "evaluation.every is set but data.eval is empty; add a dataset, or leave"),
        ("evaluation.at_start=true", "evaluation.at_start is set but data.eval is empty"),
        ("reward.clip=[1,0]", r"reward: clip \[1.0, 0.0\] leaves no room"),
        ("reward.clip=[1,1]", r"reward: clip \[1.0, 1.0\] leaves no room"),
        ("algorithm.kl.coefficient=0.1", "kl.coefficient is set but kl.placement is none; set placement"),
        ("learner.optimizer.betas=[0.9,1.0]", "learner.optimizer.betas.1 is 1.0: input should be less than 1"),
        ("learner.optimizer.betas=[0.9]", "learner.optimizer.betas has 1 items; it needs one more"),
        ("reward.functions[0].weight=0.5", r"the file sets no list reward\.functions; give the whole list, as in"),
        ("data.eval.0.path=x", r"'data.eval.0.path=x': the file sets no list data\.eval; give the whole"),
        ("rollout.stop=[a", r"override 'rollout.stop=\[a' cannot be read"),
        ("rollout.stop=['']", r"rollout\.stop\.0 is '': string should have at least 1 character"),
        ("rollout.group_size=10000000000", "rollout.group_size is 10000000000: input should be less than or equal to"),
        ("ray.rollout_resources={CPU: 1}", "ray: rollout_resources holds CPU, which placement decides"),
        ("run_dir=''", "run_dir is '': string should have at least 1 character"),
        ("data.train.path=[]", r"data\.train\.path is \[\]: give at least 1"),
        ("data.train.path=[a.jsonl,3]", r"data\.train\.path\.1 is 3: input should be a valid string"),
        ("data.train.path=3", r"data\.train\.path is 3: input should be a valid string"),
        ("name=${oc.env:FLEDGE_NOT_SET}", "name: .*Environment variable 'FLEDGE_NOT_SET' not found"),
        ("algorithm.kl.placement=loss", "kl.placement is loss but kl.coefficient is 0"),
        ("deterministic=true", "deterministic needs model.dtype float32"),
        ("algorithm.kl.adaptive_target=0.1", "kl.adaptive_target is set but kl.placement is none"),
        ("algorithm.kl.reference=x", "kl.reference is set but kl.placement is none"),
        (
            "algorithm.rollout_correction={mode: mask, lower: 1, upper: 1}",
            "lower 1 is not below upper 1, so only ratios of exactly 1 would be kept",
        ),
        ("algorithm.rollout_correction.upper=0.5", "upper is 0.5: input should be greater than or equal to 1"),
        (
            "evaluation.samples_per_prompt=8",
            "samples_per_prompt is 8, but at temperature 0 all responses",
        ),
        ("algorithm.dynamic_sampling.max_rounds=1", "max_rounds is 1: input should be greater than or equal to 2"),
        ("algorithm.dynamic_sampling.rounds=3", "unknown key algorithm.dynamic_sampling.rounds; did you mean max_rou"),
        ("rollout.reject_degenerate.min_tokens=2000", "min_tokens 2000 is more than rollout.max_response_tokens 1024"),
        ("data.curriculum.floor=0", "data.curriculum.floor is 0: input should be greater than or equal to 0.01"),
        ("critic.warmup_steps=100", "critic.warmup_steps 100 leaves none of total_steps 100 for the policy"),
        ("critic.clip_range=0", "critic.clip_range is 0: input should be greater than 0"),
        ("critic.optimiser.lr=1", "unknown key critic.optimiser; did you mean optimizer?"),
        ("rollout.temperature=0.005", "rollout.temperature: vLLM would sample at 0.01 instead; set at least"),
        ("evaluation.temperature=0.001", "evaluation.temperature: vLLM would sample at 0.01"),
        ("lr=1e-5", "unknown key lr; did you mean learner.optimizer.lr or critic.optimizer.lr?"),
        ("data.path=x", "unknown key data.path; did you mean data.train.path?"),
        ("model.name=x", "unknown key model.name; known keys here: attention, chat_template"),
        ("algorithm.group_size=3", "unknown key algorithm.group_size; did you mean rollout.group_size?"),
        ("rollout.seed=3", "unknown key rollout.seed; known keys here"),
        ("epochs=3", "unknown key epochs; did you mean learner.epochs?"),
        ("learner.lr=1e-5", "unknown key learner.lr; did you mean learner.optimizer.lr?"),
        ("reward.functions=mine:fn", r"reward.functions is 'mine:fn': it must be a list, \[..., ...\]"),
        ("reward.functions=[mine:fn]", "reward.functions.0 is 'mine:fn': it must be a mapping of name, weight, gate"),
        ("run_dir=", "override 'run_dir=' has no value; write run_dir=null for the default"),
        ("no_equals_sign", "override 'no_equals_sign' is not key=value"),
    ],
)
def test_errors_name_key_value_and_remedy(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [override], TrainConfig)


def test_a_problem_is_said_to_come_from_the_override_that_it_comes_from(config_file):
    config_file.write_text(config_file.read_text() + "rollout: {top_p: 7}\n")
    with pytest.raises(ConfigError) as error:
        load_config(
            config_file, ["learner.optimizer.lr=-1", "evaluation={samples_per_prompt: 0}", "name=x"], TrainConfig
        )
    problems = str(error.value).removeprefix(f"{config_file}: ").split("; ")
    assert len(problems) == 3
    for problem in problems:
        key = problem.split(" is ")[0]
        override = {
            "learner.optimizer.lr": " (from the override learner.optimizer.lr=-1)",
            "evaluation.samples_per_prompt": " (from the override evaluation={samples_per_prompt: 0})",
            "rollout.top_p": "",
        }[key]
        assert problem.endswith(override) and ("override" in problem) == bool(override), problem


def test_a_file_that_extends_a_missing_one_is_named(config_file):
    child = config_file.parent / "child.yaml"
    child.write_text("extends: bases/base.yaml\n")
    missing = config_file.parent / "bases" / "base.yaml"
    with pytest.raises(
        ConfigError, match=rf"{child} extends {missing}, which does not exist; a path in extends is rel"
    ):
        load_config(child, [], TrainConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.top_k=20"], "evaluation: top_k has no effect at temperature 0"),
        (["rollout.min_p=0.1", "rollout.temperature=0"], "rollout: min_p has no effect at temperature 0"),
        (
            ["rollout.kv_cache_gib=2", "rollout.gpu_memory_utilization=0.5"],
            "kv_cache_gib 2 fixes the cache, so gpu_mem",
        ),
        (["algorithm.kl.estimator=k1"], "kl.estimator is set but kl.placement is none"),
        (["algorithm.kl.adaptive_horizon=9"], "kl.adaptive_horizon is set but kl.placement is none"),
        (
            ["algorithm.kl={placement: loss, coefficient: 0.1, adaptive_horizon: 9}"],
            "kl.adaptive_horizon is set but kl.adaptive_target is not",
        ),
        (
            ["algorithm.kl={placement: loss, coefficient: 0.1, adaptive_target: 0.1, adaptive_horizon: 255}"],
            "algorithm.kl.adaptive_horizon 255 is less than the 256 samples of a step, so one step",
        ),
        (["algorithm.rollout_correction.lower=0.5"], "lower 0.5 has no effect with mode truncate; set mode to mask"),
        (["learner.optimizer={name: sgd, eps: 0.1}"], "eps has no effect with optimizer.name sgd"),
        (["learner.optimizer.min_lr_ratio=0.1"], "min_lr_ratio has no effect with schedule constant"),
        (
            ["rollout.engine_options={block_size: 16, max_num_seqs: 3}"],
            "engine_options holds max_num_seqs, which is rollout.max_concurrent_sequences here; set that instead, and",
        ),
        (
            ["rollout.engine_options.logprobs_mode=raw_logits"],
            "engine_options holds logprobs_mode, which placement and weight sync decide, and leave it out",
        ),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(config_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, overrides, TrainConfig)


@pytest.mark.parametrize("allowed", ["model.dtype=float32", "rollout.temperature=0"])
def test_a_deterministic_run_is_possible(config_file, allowed):
    assert load_config(config_file, ["deterministic=true", allowed], TrainConfig).deterministic


@pytest.mark.parametrize("cut", ["top_p=0.9", "top_k=20", "min_p=0.1"])
def test_a_cut_distribution_cannot_be_corrected_by_sequence(config_file, cut):
    level = "algorithm.rollout_correction.level=sequence"
    with pytest.raises(ConfigError, match=f"rollout.{cut.partition('=')[0]} truncates the sampler's distribution"):
        load_config(config_file, [f"rollout.{cut}", level], TrainConfig)
    for allowed in ([level], [f"rollout.{cut}"], [f"rollout.{cut}", level, "algorithm.rollout_correction.mode=none"]):
        load_config(config_file, allowed, TrainConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_size=1", "rewards differ, but rollout.group_size 1 at rollout.temperature 1 gives none"),
        (
            "rollout.temperature=0",
            "rollout.temperature 0 gives none; set group_size to at least 2, and",
        ),
    ],
)
def test_dynamic_sampling_needs_groups_that_can_differ(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, ["algorithm.dynamic_sampling={}", override], TrainConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=cpu", "sync.transport=nccl"], "sync.transport nccl needs GPUs, but device is cpu; set it to auto"),
        (["device=cpu", "learner.moe.router_replay=true"], "router_replay needs the experts that vLLM chose"),
        (["ray.colocate=true", "rollout.num_workers=3"], "num_workers is 3 with tensor_parallel_size 1, and .* 1; use"),
        (["ray.colocate=true", "rollout.tensor_parallel_size=2"], "with tensor_parallel_size 2"),
        (
            ["learner.moe.router_replay=true", "rollout.enable_prefix_caching=false"],
            "router_replay needs rollout.enable",
        ),
        (["ray.colocate=true"], "take rollout.gpu_memory_utilization 0.85 of the GPU before the learner loads"),
    ],
)
def test_devices_that_cannot_work_together_are_refused(config_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, overrides, TrainConfig)


@pytest.mark.parametrize(
    "share",
    [
        "rollout.gpu_memory_utilization=0.85",
        "rollout.kv_cache_gib=2",
        "device=cpu",
    ],
)
def test_a_shared_gpu_needs_the_engines_share_in_so_many_words(config_file, tmp_path, share):
    config = load_config(config_file, ["ray.colocate=true", share], TrainConfig)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(resolved, [], TrainConfig) == config


@pytest.mark.parametrize("key", ["epochs", "mini_batches"])
def test_supervised_runs_refuse_what_they_would_ignore(tmp_path, key):
    path = tmp_path / "sft.yaml"
    path.write_text("model: {path: some/model}\ndata: {train: {path: rows.jsonl}}\n")
    assert load_config(path, ["epochs=3"], SftConfig).epochs == 3
    with pytest.raises(ConfigError, match=rf"learner.{key} is 2, but a supervised step makes one optimizer step"):
        load_config(path, [f"learner.{key}=2"], SftConfig)
    with pytest.raises(ConfigError, match=r"max_tokens_per_microbatch 16384 is less than data.max_tokens 20000"):
        load_config(path, ["data.max_tokens=20000"], SftConfig)
    with pytest.raises(ConfigError, match=r"evaluation.every is set but data.eval is not"):
        load_config(path, ["evaluation.every=2"], SftConfig)
    with pytest.raises(ConfigError, match=r"data.eval.reward has no effect in a supervised run"):
        load_config(path, ["data.eval={path: held_out.jsonl, reward: math}"], SftConfig)
    for change in (
        "data.train.reward=math",
        "data.train.ground_truth_field=answer",
        "learner.moe.router_replay=true",
        "ray.colocate=true",
    ):
        key = change.partition("=")[0]
        with pytest.raises(ConfigError, match=f"{key} has no effect in a supervised run"):
            load_config(path, [change], SftConfig)
        load_config(path, [f"{key}=null"], SftConfig)


def test_what_is_here_is_found_from_the_workers_directories_too(config_file, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "plugin.py").touch()
    monkeypatch.chdir(tmp_path)
    overrides = ["model.path=here", "algorithm.plugins=[plugin.py,here]", "algorithm.kl.reference=org/on_the_hub"]
    overrides += ["algorithm.kl.placement=loss", "algorithm.kl.coefficient=0.1"]
    config = load_config(config_file, overrides, TrainConfig)
    assert config.model.path == str(tmp_path / "here")
    assert config.algorithm.plugins == (str(tmp_path / "plugin.py"), "here")  # the second is a module's name
    assert config.algorithm.kl.reference == "org/on_the_hub"


def test_a_critic_is_there_only_when_it_is_asked_for(config_file):
    assert load_config(config_file, [], TrainConfig).critic is None
    critic = load_config(config_file, ["critic.optimizer.weight_decay=0.1"], TrainConfig).critic
    assert (critic.optimizer.lr, critic.optimizer.weight_decay, critic.clip_range) == (1e-5, 0.1, 0.2)


def test_null_is_a_value_where_it_is_one_and_the_default_elsewhere(config_file):
    overrides = ["critic.clip_range=null", "data.train.ground_truth_field=null", "learner.optimizer.lr=null"]
    config = load_config(config_file, overrides, TrainConfig)
    assert config.critic is not None
    assert (config.critic.clip_range, config.data.train.ground_truth_field) == (None, None)
    assert config.learner.optimizer.lr == 1e-6


def test_all_problems_are_reported_at_once(config_file):
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["rollout.group_size=0", "learner.epochs=0", "nmae=x"], TrainConfig)
    for part in ("rollout.group_size is 0", "learner.epochs is 0", "unknown key nmae; did you mean name?"):
        assert part in str(caught.value)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml", [], TrainConfig)
    empty = tmp_path / "empty.yaml"
    empty.write_text("name: x\n")
    with pytest.raises(ConfigError, match="model is required but not set; data is required"):
        load_config(empty, [], TrainConfig)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just text"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config(path, [], TrainConfig)


def test_a_list_that_extends_a_mapping_is_named(tmp_path):
    base = CONFIGS[0].parent / "quickstart.yaml"
    for name, text, key in (
        ("a", "data: [1]", "data"),
        ("b", "reward: {functions: {name: exact}}", "reward.functions"),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"extends: {base}\n{text}\n")
        with pytest.raises(ConfigError, match=rf"{name}\.yaml: {key} is a mapping in this file and a list in"):
            load_config(path, [], TrainConfig)


def test_a_config_that_extends_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(tmp_path / "a.yaml", [], TrainConfig)


def test_an_unresolved_interpolation_is_an_error(config_file):
    with pytest.raises(ConfigError, match="nothing_here"):
        load_config(config_file, ["name=${nothing_here}"], TrainConfig)


def test_what_an_extended_file_sets_can_be_unset_and_list_items_overridden(tmp_path):
    base = CONFIGS[0].parent / "quickstart.yaml"
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {base}\n")
    overrides = ["data.train.path=my.jsonl", "data.train.options=null", "data.train.seed=null", "data.train.size=null"]
    config = load_config(own, [*overrides, "reward.functions[0].name=exact"], TrainConfig)
    assert (config.data.train.options, config.data.train.seed, config.data.train.size) == ({}, 0, None)
    merged = {**load_config(own, [], TrainConfig).data.train.options, "min_terms": 3}
    assert len(merged) > 1
    assert load_config(own, ["data.train.options={min_terms: 3}"], TrainConfig).data.train.options == merged
    assert load_config(own, ["data.train.options={}"], TrainConfig).data.train.options == {}
    assert config.reward.functions[0].name == "exact"
    with pytest.raises(
        ConfigError, match=r"override 'reward.functions\[7\].name=exact': reward.functions has \d items"
    ):
        load_config(own, ["reward.functions[7].name=exact"], TrainConfig)
    with pytest.raises(ConfigError, match=r"the file sets a mapping for data.train and this is a list"):
        load_config(own, ["data.train=[{path: rows.jsonl}]"], TrainConfig)
    for key in ("reward.functions.name", "reward.functions[first].name"):
        with pytest.raises(ConfigError, match=r"items of a list are addressed by number, .* data\.eval\[0\]\.path"):
            load_config(own, [f"{key}=exact"], TrainConfig)


@pytest.mark.parametrize("override", ["seed=-1", "seed=4294967296", "learner.optimizer.lr=inf", "sync.timeout_s=nan"])
def test_numbers_that_nothing_can_work_with_are_refused(config_file, override):
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]} is "):
        load_config(config_file, [override], TrainConfig)

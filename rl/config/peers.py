"""What keys and values of verl, TRL and OpenRLHF are called here, to help users who bring a recipe from one of them.

Left out: reading those configurations (docs/migrating.md explains how to translate them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_MICRO_BATCHES = "micro-batches are filled by tokens, and do not change the result"
_STEPS = "the number of optimizer steps per pass over the batch: train_batch_size / ppo_mini_batch_size"
_RATIO = "in optimizer steps: the ratio x total_steps x learner.epochs x learner.mini_batches"
_ZERO3 = "learners are data-parallel, with ZeRO-3 (docs/roadmap.md)"
_NO_SLEEP = "engines that share GPUs keep their memory (docs/roadmap.md)"
_RESUME = "`fledge train CONFIG --resume` continues from the newest checkpoint, or starts anew if there is none"
_TURNS = "a response is one generation: there are no rollouts of several turns or with tools yet (docs/roadmap.md)"
_REFERENCE = "the reference is frozen: the initial policy, or algorithm.kl.reference"
_CHUNKS = "log-probabilities are always computed in chunks (learner.logprob_chunk_tokens)"
_SAMPLES = "how many samples of a step are written to run_dir/samples; an evaluation writes all"
_FUNCTIONS = "a list of {name: file.py:function, weight: 1, options: {}}"

# Each row: the key here, or "TRAIN KEY or SFT KEY" (empty if there is none); a note; and the last parts of the peers'
# keys, each optionally preceded by the section here in which it was found. Keys that have the same name here are left
# out: the schema finds them.
PEERS: tuple[tuple[str, str, str], ...] = (
    ("model.path", "", "model_name_or_path pretrain"),
    ("model.dtype", "", "torch_dtype bf16 fp16"),
    ("model.attention", "", "attn_implementation flash_attn use_flash_attn"),
    ("model.chat_template", "always applied; a file, or the tokenizer's own", "apply_chat_template input_template"),
    ("model.chat_template_options", "", "apply_chat_template_kwargs chat_template_kwargs"),
    ("data.train.path", "", "train_files prompt_data train_dataset dataset_name"),
    ("data.eval", "a list of datasets, each with a path; in `fledge sft` one of them", "val_files eval_dataset"),
    ("data.train.prompt_field", "", "prompt_key input_key"),
    ("data.train.ground_truth_field", "", "label_key"),
    ("data.train.size", "", "train_max_samples max_samples"),
    ("data.shuffle", "", "shuffle_dataset"),
    ("data.max_prompt_tokens", "longer prompts are dropped and counted", "filter_overlong_prompts truncation"),
    ("data.max_prompt_tokens or data.max_tokens", "", "max_prompt_length prompt_max_len max_seq_length max_length"),
    ("rollout.group_size", "", "rollout.n num_generations n_samples_per_prompt"),
    ("evaluation.samples_per_prompt", "", "evaluation.n evaluation.num_generations num_generations_eval"),
    (
        "rollout.prompts_per_step or batch_size",
        "in prompts or examples",
        "train_batch_size rollout_batch_size gen_batch_size",
    ),
    ("rollout.max_response_tokens", "", "max_response_length max_completion_length generate_max_len max_new_tokens"),
    ("rollout.tensor_parallel_size", "", "tensor_model_parallel_size vllm_tensor_parallel_size"),
    ("rollout.num_workers", "", "vllm_num_engines"),
    ("rollout.gpu_memory_utilization", "", "vllm_gpu_memory_utilization"),
    ("rollout.max_concurrent_sequences", "", "max_num_seqs"),
    (
        "rollout.engine_options",
        "any argument of vLLM's AsyncEngineArgs",
        "max_num_batched_tokens max_model_len enable_chunked_prefill engine_kwargs vllm_max_model_length",
    ),
    ("evaluation", "", "val_kwargs eval_temperature eval_n_samples_per_prompt"),
    ("ray.colocate", "", "colocate_all_models colocate_actor_ref vllm_mode"),
    ("", _NO_SLEEP, "free_cache_engine vllm_enable_sleep vllm_enable_sleep_mode deepspeed_enable_sleep"),
    ("", "sampler and learner always both compute log-probabilities", "calculate_log_probs"),
    ("", "the learner would not take it into account", "repetition_penalty"),
    ("learner.mini_batches", _STEPS, "ppo_mini_batch_size mini_batch_size"),
    ("learner.mini_batches", "steps_per_generation / gradient_accumulation_steps", "steps_per_generation"),
    (
        "learner.max_tokens_per_microbatch",
        _MICRO_BATCHES,
        "ppo_micro_batch_size ppo_micro_batch_size_per_gpu log_prob_micro_batch_size_per_gpu ppo_max_token_len_per_gpu "
        "log_prob_max_token_len_per_gpu use_dynamic_bsz micro_train_batch_size micro_rollout_batch_size "
        "per_device_train_batch_size gradient_accumulation_steps",
    ),
    ("learner.epochs", "", "ppo_epochs num_iterations"),
    ("learner.epochs or epochs", "", "max_epochs"),
    ("learner.num_workers", "", "n_gpus_per_node nnodes actor_num_gpus_per_node actor_num_nodes"),
    ("learner.optimizer.lr", "", "learning_rate actor_learning_rate"),
    ("critic.optimizer.lr", "", "critic_learning_rate"),
    ("learner.optimizer.schedule", "", "lr_scheduler_type warmup_style lr_scheduler"),
    ("learner.optimizer.warmup_steps", "in optimizer steps", "lr_warmup_steps"),
    ("learner.optimizer.warmup_steps", _RATIO, "warmup_ratio lr_warmup_ratio lr_warmup_steps_ratio"),
    ("learner.optimizer.betas", "", "adam_betas adam_beta1 adam_beta2"),
    ("learner.optimizer.weight_decay", "", "l2"),
    ("learner.optimizer.max_grad_norm", "", "grad_clip clip_grad max_norm"),
    ("learner.activation_checkpointing", "", "enable_gradient_checkpointing gradient_checkpointing"),
    ("learner.offload_parameters", "", "param_offload"),
    ("learner.offload_optimizer", "", "optimizer_offload adam_offload"),
    ("learner.offload_reference", "", "ref_reward_offload"),
    ("learner.layout", "", "use_remove_padding packing_samples packing"),
    ("critic.clip_range", "", "cliprange_value value_clip"),
    ("critic.path", "", "critic_pretrain critic.model"),
    ("critic.warmup_steps", "", "critic_warmup freezing_actor_steps"),
    ("", "there is no LoRA yet (docs/roadmap.md)", "lora_rank lora_alpha target_modules peft_config use_peft"),
    ("", _ZERO3, "ulysses_sequence_parallel_size ring_attn_size fsdp_config deepspeed deepspeed_config zero_stage"),
    ("", _TURNS, "agent_func_path multi_turn max_tool_calling_iterations"),
    ("", "training is synchronous (docs/roadmap.md)", "async_train async_queue_size"),
    ("", _CHUNKS, "use_liger_kernel use_liger_loss"),
    ("algorithm.advantage", "", "adv_estimator advantage_estimator"),
    ("algorithm.loss, algorithm.aggregation", "", "loss_mode loss_type policy_loss"),
    ("algorithm.aggregation", "", "loss_agg_mode"),
    ("algorithm.loss_options.clip_low", "", "clip_ratio clip_ratio_low epsilon eps_clip cliprange"),
    ("algorithm.loss_options.clip_high", "", "clip_ratio_high epsilon_high"),
    ("algorithm.loss_options.clip_low, algorithm.loss_options.clip_high", "", "eps_clip_low_high"),
    ("algorithm.loss", "gspo is the one of whole sequences", "importance_sampling_level"),
    ("", "a loss of your own can choose tokens (docs/adding-an-algorithm.md)", "top_entropy_quantile"),
    ("algorithm.loss_options.dual_clip", "", "clip_ratio_c delta"),
    ("algorithm.entropy_coefficient", "", "entropy_coeff entropy_coef entropy_loss_coef"),
    ("algorithm.kl.placement", "loss", "use_kl_loss"),
    ("algorithm.kl.placement", "reward", "use_kl_in_reward"),
    ("algorithm.kl.coefficient", "with a kl.placement", "kl_loss_coef kl_coef init_kl_coef beta"),
    ("algorithm.kl.estimator", "", "kl_loss_type kl_penalty kl_estimator use_kl_estimator_k3"),
    ("", _REFERENCE, "sync_ref_model ref_model_sync_steps ref_model_mixup_alpha"),
    ("algorithm.kl.adaptive_target", "", "target_kl kl_target"),
    ("algorithm.kl.adaptive_horizon", "", "horizon kl_horizon"),
    ("algorithm.advantage_options", "options of gae: gamma, lam", "gamma lam lambd"),
    (
        "algorithm.advantage",
        "grpo divides by the standard deviation, dr_grpo does not",
        "norm_adv_by_std_in_grpo scale_rewards no_advantage_std_norm",
    ),
    ("algorithm.dynamic_sampling", "", "filter_groups dynamic_filtering"),
    ("algorithm.dynamic_sampling.max_rounds", "", "max_num_gen_batches"),
    ("algorithm.mask_truncated", "", "mask_truncated_completions"),
    (
        "algorithm.rollout_correction",
        "",
        "rollout_is rollout_is_threshold tis_imp_ratio_cap enable_vllm_is_correction vllm_is_truncated_threshold "
        "vllm_importance_sampling_correction vllm_importance_sampling_cap vllm_importance_sampling_clip_max",
    ),
    ("reward.functions", _FUNCTIONS, "custom_reward_function reward_funcs reward_manager reward_weights reward_kwargs"),
    ("reward.functions", "a function of yours that asks it (docs/rewards/writing-a-reward.md)", "remote_rm_url"),
    ("reward.clip", "", "reward_clip_range"),
    ("", "each row's data_source says which reward it gets (docs/rewards/README.md)", "reward_fn_key"),
    ("reward.functions", "the reward length (docs/rewards/length.md)", "overlong_buffer overlong_buffer_len"),
    ("total_epochs or epochs", "", "num_train_epochs num_episodes"),
    ("total_steps", "", "total_training_steps max_steps"),
    ("checkpoint.every", "", "save_freq save_steps save_interval"),
    ("checkpoint.keep", "", "max_actor_ckpt_to_keep save_total_limit max_ckpt_num"),
    ("checkpoint.keep_best", "", "metric_for_best_model load_best_model_at_end best_metric_key"),
    ("evaluation.every", "", "test_freq eval_steps eval_strategy"),
    ("", "`fledge eval CONFIG`", "val_only"),
    ("evaluation.at_start", "", "val_before_train eval_on_start"),
    ("run_dir", "", "default_local_dir output_dir ckpt_path save_path"),
    ("name", "", "experiment_name run_name wandb_run_name"),
    ("logging", "metrics.jsonl always; tensorboard, wandb_project", "logger report_to"),
    ("logging.samples_per_step", _SAMPLES, "rollout_data_dir validation_data_dir log_completions log_val_generations"),
    ("", "every step is logged", "logging_steps logging_strategy logging_first_step"),
    ("", "exports are folders; upload them yourself (docs/roadmap.md)", "push_to_hub hub_model_id"),
    ("logging.wandb_project", "", "project_name use_wandb"),
    ("", "set WANDB_ENTITY, WANDB_RUN_GROUP or WANDB_TAGS", "wandb_entity wandb_org wandb_group wandb_tags"),
    ("", _RESUME, "resume_mode resume_from_checkpoint resume_from_path load_checkpoint"),
)
PEER_KEYS = {name: (key, note) for key, note, names in PEERS for name in names.split()}

PEER_SECTIONS = {"actor_rollout_ref", "actor", "trainer", "reward_model", "ref"}  # verl's; none is one key here

_MOST_PLACES = 2  # places of one name that a hint lists at most

# Peers' names for the values of settings that allow only a few -> the values here.
PEER_VALUES = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean_token_mean",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    "seq-mean-token-sum-norm": "fixed_length",
    "kl": "k1",
    "mse": "k2",
    "low_var_kl": "k3",
    "k1+": "k1_straight_through",
    "k3+": "k3_straight_through",
    "low_var_kl+": "k3_straight_through",
    "cosine_with_min_lr": "cosine",
    "constant_with_warmup": "constant",
}


def peer_hint(section: Sequence[str], name: str, places: Callable[[str], Sequence[str]]) -> str:
    """What a peer's key `name`, found in `section` (Fledge's or the peer's), is called here.

    `places` gives the keys of a schema by their last part. Empty if `name` is no peer's key, or the schema lacks its
    counterpart.
    """
    keys, note = PEER_KEYS.get(f"{section[-1]}.{name}" if section else "") or PEER_KEYS.get(name, ("", ""))
    if not keys:
        return f"there is none here: {note}" if note else ""
    here = [key for key in keys.split(" or ") if all(map(_exists(places), key.split(", ")))]
    if not here:
        return ""
    key = here[-1]
    if section and section[0] in ("critic", "evaluation"):  # the critic or evaluation has its own such setting
        own = [place for place in places(key.rpartition(".")[2]) if place.startswith(f"{section[0]}.")]
        key = own[0] if own else key
    return f"here it is {key}" + (f" ({note})" if note else "")


def hints_inside(name: str, value: Any, places: Callable[[str], Sequence[str]]) -> str:
    """What the keys inside `value`, a peer's section `name`, are called here; empty if none is known."""
    hints = []
    for path in _leaves(value):
        *parents, leaf = path.split(".")
        hint = peer_hint(parents[-1:], leaf, places)
        if not hint and name in PEER_SECTIONS and 0 < len(own := places(leaf)) <= _MOST_PLACES:
            hint = f"here it is {' or '.join(own)}"
        if hint:
            hints.append(f"{leaf}: {hint}")
    if name in PEER_SECTIONS:
        hints.append("docs/configuration.md ends with verl's keys")
    return "; ".join(dict.fromkeys(hints))


def _exists(places: Callable[[str], Sequence[str]]) -> Callable[[str], bool]:
    def exists(key: str) -> bool:
        section, _, name = key.rpartition(".")
        return key in places(name) or section in places(section.rpartition(".")[2])  # or an entry of a mapping

    return exists


def _leaves(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a nested mapping, not descending into keys that have a counterpart here."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        yield f"{prefix}{key}"
        if key not in PEER_KEYS:
            yield from _leaves(inner, f"{prefix}{key}.")

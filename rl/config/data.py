"""The model, and what it is trained on: prompts and worked examples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.config.types import Float, LocalOrNamed, OneOrSeveral, PositiveInt, Section, Seed


class ModelConfig(Section):
    """The policy."""

    path: LocalOrNamed = Field(description="Hugging Face checkpoint of the policy: a local folder or hub name")
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub checkpoint; null uses the hub's default branch"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="dtype of the weights in learner and engines; the optimizer keeps its own weights in float32",
    )
    head_dtype: Literal["model", "float32"] = Field(
        "model",
        description="dtype in which logits are computed, in learner and engines; model means the same as dtype; see "
        "docs/learner.md",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "auto",
        description="attention implementation of the learner; auto chooses the best exact one for the model and device",
    )
    trust_remote_code: bool = Field(False, description="allow Python code that comes with the checkpoint to run")
    chat_template: LocalOrNamed | None = Field(
        None, description="file with a Jinja chat template; null uses the tokenizer's own template"
    )
    chat_template_options: dict[str, Any] = Field(
        default_factory=dict,
        description="variables passed to the chat template, e.g. enable_thinking or reasoning_effort",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.dtype == "float32" and self.head_dtype == "float32":
            raise ValueError("head_dtype float32 has no effect with dtype float32; leave it out")
        return self


class DatasetConfig(Section):
    """Where prompts come from."""

    path: OneOrSeveral = Field(
        description="JSONL or Parquet file, local dataset folder, hub name, or reasoning_gym:TASK; a list of files, "
        "folders and hub names is read in order as one dataset"
    )
    name: str | None = Field(
        None, description="name of the dataset in metrics and file names; null derives it from path"
    )
    split: str = Field("train", description="split to read; applies to dataset folders and hub datasets")
    subset: str | None = Field(
        None,
        description="configuration to load; applies to hub datasets and folders of data files; null uses the default "
        "one",
    )
    prompt_field: str = Field(
        "prompt", description="column that holds the prompt, as text or as a list of chat messages"
    )
    ground_truth_field: str | None = Field(
        "ground_truth", description="column that holds the ground truth; null if the rewards need none"
    )
    system_prompt: str | None = Field(
        None, description="system message added to conversations that have none; null adds nothing"
    )
    prompt_suffix: str = Field("", description="text appended to the last user message, e.g. the answer format to use")
    size: PositiveInt | None = Field(
        None,
        description="use only this many rows, from the start; for reasoning_gym, the number of tasks to generate; "
        "null uses all rows, or the task's own default",
    )
    seed: Seed = Field(0, description="seed for generating reasoning_gym tasks")
    options: dict[str, Any] = Field(default_factory=dict, description="settings of the reasoning_gym task")
    reward: str | None = Field(
        None,
        description="reward for rows that name none themselves, in place of the task rewards in reward.functions; "
        "null keeps those",
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The dataset's sources, in order."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def shown_path(self) -> str:
        """The sources as one text, for messages."""
        return ", ".join(self.paths)


class EvalDatasetConfig(DatasetConfig):
    """Where evaluation prompts come from. The split has no default, lest it be the one that is trained on."""

    split: str = Field(
        "",
        description="split to read; applies to dataset folders and hub datasets, and may be left out if there is only "
        "one",
    )


class CurriculumConfig(Section):
    """Selects prompts by running pass rate p: when the order reaches one, it is kept with chance max(4 p (1 - p),
    floor)."""

    decay: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.5,
        description="weight of the old value when a prompt's running pass rate is updated; 0 keeps only the latest "
        "pass rate",
    )
    floor: Annotated[Float, Field(ge=0.01, le=1)] = Field(
        0.05, description="minimum probability of using a prompt when its turn comes, so that none is lost for good"
    )
    right_above: Float = Field(0.0, description="a response counts as right if its task reward is above this value")


class DataConfig(Section):
    """Training and evaluation prompts."""

    train: DatasetConfig | None = Field(None, description="prompts to learn from; `fledge eval` does not need them")
    eval: tuple[EvalDatasetConfig, ...] = Field((), description="datasets of prompts to evaluate on")
    shuffle: bool = Field(
        True,
        description="visit the prompts in a different order each epoch, determined by seed; false keeps the order of "
        "the rows",
    )
    curriculum: CurriculumConfig | None = Field(
        None,
        description="prefer prompts that are solved sometimes, neither always nor never; null uses every prompt once "
        "per epoch",
    )
    max_prompt_tokens: PositiveInt = Field(
        1024,
        description="maximum length of a prompt in tokens, chat template included; longer prompts are dropped and "
        "counted",
    )
    train_on_eval_prompts: bool = Field(
        False, description="keep training prompts that are also in data.eval; by default they are dropped"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        for dataset in self.eval:
            if dataset.name is not None and ("/" in dataset.name or not dataset.name.isprintable()):
                raise ValueError(
                    f"eval has a dataset with the name {dataset.name!r}, which becomes part of file names; remove "
                    "slashes and control characters from it"
                )
        return self


class SftDataConfig(Section):
    """Worked examples: rows with a prompt and a response."""

    train: DatasetConfig = Field(description="rows with a prompt and a response, or with `messages`")
    eval: DatasetConfig | None = Field(
        None,
        description="held-out examples in the same form, whose loss is `eval/loss`; training examples with one of "
        "their prompts are dropped and counted",
    )
    response_field: str = Field("response", description="column that holds the response")
    max_tokens: PositiveInt = Field(
        2048,
        description="maximum length of an example (prompt and response) in tokens; longer examples are dropped and "
        "counted",
    )

"""What is trained, and on what: the model, prompts and worked examples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.config.types import Float, LocalOrNamed, OneOrSeveral, PositiveInt, Section, Seed


class ModelConfig(Section):
    """The policy."""

    path: LocalOrNamed = Field(description="local folder or hub name of a Hugging Face checkpoint")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="of the weights in learner and engine; the optimizer's are float32"
    )
    head_dtype: Literal["model", "float32"] = Field(
        "model", description="of the logits, in learner and engine; see docs/learner.md"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "auto", description="the learner's attention; auto takes the best exact one for the model and the device"
    )
    trust_remote_code: bool = Field(False, description="run code that the checkpoint brings")
    chat_template: LocalOrNamed | None = Field(
        None, description="file with a Jinja chat template, in place of the tokenizer's"
    )
    chat_template_options: dict[str, Any] = Field(
        default_factory=dict, description="passed to the template, e.g. enable_thinking or reasoning_effort"
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
        "folders and names is one dataset, in their order"
    )
    name: str | None = Field(None, description="how metrics and files call it; default: from the path")
    split: str = Field("train", description="of a folder or hub dataset")
    subset: str | None = Field(None, description="a hub dataset's configuration name")
    prompt_field: str = Field("prompt", description="a column with text, or with chat messages")
    ground_truth_field: str | None = Field("ground_truth", description="null: the rewards need no ground truth")
    system_prompt: str | None = Field(None, description="put before conversations without a system message")
    prompt_suffix: str = Field("", description="appended to the user's message, e.g. how to give the answer")
    size: PositiveInt | None = Field(None, description="use only the first rows; for reasoning_gym, how many to make")
    seed: Seed = Field(0, description="for generated tasks")
    options: dict[str, Any] = Field(default_factory=dict, description="for reasoning_gym: the task's own settings")
    reward: str | None = Field(None, description="reward for these rows in place of the config's")

    @property
    def paths(self) -> tuple[str, ...]:
        """Where its rows are, one after the other."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def shown_path(self) -> str:
        """For messages."""
        return ", ".join(self.paths)


class EvalDatasetConfig(DatasetConfig):
    """Where prompts to evaluate on come from: which split is said, lest it be the one that is trained on."""

    split: str = Field("", description="of a folder or hub dataset; may be left out where that has only one")


class CurriculumConfig(Section):
    """Prompts by running pass rate p: each is kept with chance 4 p (1 - p), where the order comes to it."""

    decay: Annotated[Float, Field(ge=0, lt=1)] = Field(0.5, description="weight of the old rate in the running mean")
    floor: Annotated[Float, Field(ge=0.01, le=1)] = Field(0.05, description="smallest chance, so that none is lost")
    right_above: Float = Field(0.0, description="a response is right when its task reward is above this")


class DataConfig(Section):
    """Training and evaluation prompts."""

    train: DatasetConfig | None = Field(None, description="prompts to learn from; `fledge eval` needs none")
    eval: tuple[EvalDatasetConfig, ...] = Field((), description="prompts to evaluate on, a dataset each")
    shuffle: bool = Field(True, description="in an order of its own each epoch, by seed")
    curriculum: CurriculumConfig | None = Field(None, description="null: every prompt once an epoch")
    max_prompt_tokens: PositiveInt = Field(1024, description="longer prompts are dropped and counted")
    train_on_eval_prompts: bool = Field(
        False, description="keep training prompts that are in eval, too; they are dropped otherwise"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        for dataset in self.eval:
            if dataset.name is not None and ("/" in dataset.name or not dataset.name.isprintable()):
                raise ValueError(
                    f"eval has the name {dataset.name!r}, which becomes part of file names; leave out slashes and "
                    "control characters"
                )
        return self


class SftDataConfig(Section):
    """Worked examples: rows with a prompt and a response."""

    train: DatasetConfig = Field(description="rows with a prompt and a response, or with `messages`")
    response_field: str = Field("response", description="the column with the response")
    max_tokens: PositiveInt = Field(2048, description="longer examples are dropped and counted")

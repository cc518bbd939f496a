"""From datasets to `Prompt`s and supervised examples, and the order in which training visits them.

Left out: parsing responses (`rollout.chat`) and scoring them (`rewards`). Heavy packages (datasets, transformers,
reasoning_gym) are imported by the functions that need them, so importing this package is cheap.
"""

from rl.prompts.curriculum import CurriculumSource
from rl.prompts.load import PromptSet, drop_held_out, load_prompts
from rl.prompts.sft import SftExample, SftSet, load_sft_examples
from rl.prompts.source import PromptSource
from rl.prompts.template import ChatTemplate, load_tokenizer

__all__ = [
    "ChatTemplate",
    "CurriculumSource",
    "PromptSet",
    "PromptSource",
    "SftExample",
    "SftSet",
    "drop_held_out",
    "load_prompts",
    "load_sft_examples",
    "load_tokenizer",
]

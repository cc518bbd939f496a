"""A reward as TRL's users give them to `GRPOTrainer(reward_funcs=...)`; nothing in it knows of Fledge."""


def reward_short_words(completions, **kwargs):
    return [-max((len(word) for word in completion.split()), default=0) / 100 for completion in completions]

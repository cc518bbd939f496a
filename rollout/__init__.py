"""Generation: the engine Protocol, the vLLM adapter, chat formats, and the Ray rollout workers."""

"""What every vLLM process of ours loads at its start (entry point group `vllm.general_plugins`).

It registers the receiving half of weight sync and ties the process to its owner's life. Any vLLM in this environment
imports this file, so it does nothing that a vLLM of somebody else's would notice. Left out: the implementation of both
(`rollout.weight_receiver`, `rollout.process_tie`).
"""

from __future__ import annotations

RECEIVERS = {"fledge_shm": "ShmReceiver", "fledge_nccl": "NcclReceiver", "fledge_ipc": "IpcReceiver"}


def register() -> None:
    """Called once by vLLM in each of its processes; may be called again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from rollout.process_tie import tie_to_owner

    for backend, class_name in RECEIVERS.items():
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, "rollout.weight_receiver", class_name)
    tie_to_owner()

"""Weights from the ZeRO-3 learner to the rollout engines: source, digests, buckets, sender.

Nothing is imported here, so that the receiving side can use the digest and the bucket format without the learner's
libraries. Left out: vLLM's worker engines (`rollout.weight_receiver`) and Ray (`rl.workers`).
"""

"""The digest of a tensor: proof that the receiver holds the bytes that the sender sent.

It is pure torch, so it runs where the tensor lives (CPU or CUDA), with the same result on both. Left out: cryptographic
strength; the digest guards against faults, not against an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_WORD = 8  # bytes; the tensor is read as a sequence of 64-bit words, padded with zero bytes
_CHUNK_WORDS = 1 << 20  # limits temporaries to a few times 8 MiB for a tensor of any size
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def digest(tensor: Tensor) -> int:
    """A 64-bit digest, 0 <= value < 2**64, of the tensor's bytes in row-major order, its dtype and its shape.

    With words w_i, the digest is the sum of mix(w_i xor key_i) modulo 2**64, where key_i depends on the position, the
    dtype and the shape, and mix is the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014). Therefore:

    - A sum of integers modulo 2**64 does not depend on the order of summation, so every device and every chunking gives
      the same value; the keys make it depend on the order of the words.
    - mix is a bijection: a change confined to one aligned 8-byte word *always* changes the digest.
    - mix is not linear: changes in several words cancel with probability 2**-64, even where a linear checksum is weak
      (two flipped sign bits, swapped experts, a shifted row). If every one of a million tensors were damaged in every
      one of a million syncs, the chance that one fault goes unnoticed would be 2**-24.
    """
    return int(digest_tensor(tensor).item()) & _MASK


def digest_tensor(tensor: Tensor) -> Tensor:
    """The digest as a 0-d int64 tensor on the tensor's device (two's complement), without waiting for the device."""
    words = _words(tensor.detach())
    seed = _seed(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        keys = torch.arange(start + 1, start + 1 + chunk.numel(), dtype=torch.int64, device=tensor.device)
        keys.mul_(_signed(_GOLDEN)).add_(_signed(seed))
        total += _mix(keys.bitwise_xor_(chunk)).sum()
    return total + _signed(seed)


def digest_values(digests: Mapping[str, Tensor]) -> dict[str, int]:
    """The digests by name as 0 <= value < 2**64, copied from the device at once: one by one, each would wait for it."""
    values = torch.stack(list(digests.values())).tolist() if digests else []
    return {name: value & _MASK for name, value in zip(digests, values, strict=True)}


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as int64 words, zero padded at the end; a view where alignment allows it."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=tensor.device)
    data = tensor.contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // _WORD * _WORD
    if whole == data.numel() and data.storage_offset() % _WORD == 0:
        return data.view(torch.int64)
    padded = torch.zeros(-(-data.numel() // _WORD) * _WORD, dtype=torch.uint8, device=tensor.device)
    padded[: data.numel()] = data
    return padded.view(torch.int64)


def _seed(tensor: Tensor) -> int:
    """A seed from dtype and shape, because equal bytes of another dtype or shape are another tensor."""
    text = f"{tensor.dtype}{tuple(tensor.shape)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_WORD).digest(), "little")


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(_MIX_1))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(_MIX_2))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's is arithmetic on signed integers."""
    return x.bitwise_right_shift(bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value

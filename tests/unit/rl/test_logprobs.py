"""Chunked log-probabilities equal the naive ones, and so do their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl.errors import LearnerError
from rl.logprobs import LogprobHead, token_logprobs

T, H, V = 11, 6, 17


def _case(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(0, V, (T,), generator=generator)
    return normal(T, H), normal(V, H), normal(V) if bias else None, targets


def _naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(nn.functional.linear(hidden, weight, bias) / temperature, dim=-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_the_naive_form(
    chunk_tokens: int, temperature: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl.logprobs._VOCABULARY_BLOCK", 7)  # three blocks of the head's gradient
    case = _case(bias=bias)
    hidden, weight, bias_, targets = case
    inputs = [t for t in (hidden, weight, bias_) if t is not None]
    found = token_logprobs(*case[:3], targets, temperature=temperature, chunk_tokens=chunk_tokens, entropy_grad=True)
    expected = _naive(hidden, weight, bias_, targets, temperature)
    weights = torch.linspace(-1, 2, T, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((weights * logprobs + weights.flip(0) * entropy).sum(), inputs)
        for logprobs, entropy in (found, expected)
    ]
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-11)


class _Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made in this block."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *made, 0)
        return result


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_memory_does_not_grow_with_vocabulary_times_length(entropy_grad: bool) -> None:
    """Of forward and backward: nothing is larger than the logits of one chunk, or the head's own weights."""
    tokens, hidden_size, vocabulary, chunk_tokens = 512, 8, 1000, 16
    hidden, weight = torch.randn(tokens, hidden_size, requires_grad=True), torch.randn(vocabulary, hidden_size)
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with _Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, entropy = token_logprobs(
            hidden,
            weight.requires_grad_(),
            None,
            torch.randint(vocabulary, (tokens,)),
            chunk_tokens=chunk_tokens,
            entropy_grad=entropy_grad,
        )
        (logprobs + entropy).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert chunk_tokens * vocabulary <= largest.elements <= 2 * chunk_tokens * vocabulary
    assert sum(saved) <= 2 * (tokens + vocabulary) * hidden_size


def test_entropy_carries_no_gradient_unless_asked() -> None:
    hidden, weight, bias, targets = _case()
    logprobs, entropy = token_logprobs(hidden, weight, bias, targets)
    assert logprobs.requires_grad
    assert not entropy.requires_grad


def test_logits_of_a_float32_head_are_not_rounded() -> None:
    """The gradient's products stay in bfloat16, so only the values are exact."""
    hidden, weight, bias, targets = _case(torch.bfloat16)
    case = [t.detach().double() for t in (hidden, weight, bias)]  # type: ignore[union-attr]
    exact, _ = _naive(*case, targets, 0.7)
    for wide in (True, False):
        found, _ = token_logprobs(hidden, weight, bias, targets, temperature=0.7, float32=wide)
        error = float((found.detach() - exact).abs().max())
        assert error < 1e-6 if wide else error > 1e-3


def test_low_precision_is_summed_in_float32() -> None:
    hidden, weight, _, targets = _case(torch.bfloat16, bias=False)
    logprobs, entropy = token_logprobs(hidden, weight, None, targets, chunk_tokens=2)
    assert logprobs.dtype == entropy.dtype == torch.float32
    (mine,) = torch.autograd.grad(logprobs.sum(), [weight])
    exact = weight.detach().double().requires_grad_()
    (reference,) = torch.autograd.grad(_naive(hidden.detach().double(), exact, None, targets, 1.0)[0].sum(), [exact])
    # 6 chunks added up in bfloat16 would be off by several units in the last place; one rounding is at most a half.
    # The inputs of the products (logits and their gradients) are bfloat16 too, hence the factor.
    torch.testing.assert_close(mine.double(), reference, rtol=2**-6, atol=2**-5)


class _TinyModel(nn.Module):
    """An embedding and a tied head, and nothing between them."""

    def __init__(self, *, linear_head: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.head = nn.Linear(H, V, bias=False) if linear_head else nn.Sequential(nn.Linear(H, V))
        if linear_head:
            self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids))


def test_the_head_scores_chosen_positions_in_one_call_and_is_plain_otherwise() -> None:
    torch.manual_seed(0)
    model = _TinyModel()
    input_ids = torch.arange(8).reshape(2, 4)
    logits = model(input_ids)
    head = LogprobHead(model, chunk_tokens=2)
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    positions, targets = torch.tensor([0, 5, 6]), torch.tensor([3, 9, 9])
    with head.query(positions, targets, temperature=1.0):
        logprobs, entropy = model(input_ids)
    assert calls == [1]
    flat = logits.reshape(-1, V).log_softmax(-1)[positions]
    torch.testing.assert_close(logprobs, flat.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(flat.exp() * flat).sum(-1))
    torch.testing.assert_close(model(input_ids), logits, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 0.7, "entropy_grad": True}])
def test_the_head_scores_as_it_is_asked_to(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, found = _TinyModel().bfloat16(), {}
    input_ids, targets = torch.arange(3), torch.tensor([3, 9, 9])
    for wide in (True, False):
        expected = torch.stack(
            token_logprobs(model.embedding(input_ids), model.head.weight, None, targets, float32=wide, **options)
        )
        with LogprobHead(model, 4, float32=wide).query(input_ids, targets, **options):
            found[wide] = model(input_ids)
        gradients = [torch.autograd.grad(pair.sum(), model.embedding.weight)[0] for pair in (found[wide], expected)]
        assert torch.equal(found[wide], expected)
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert not torch.equal(found[True], found[False])


def test_gradients_reach_a_tied_embedding_from_both_ends() -> None:
    gradients = []
    for chunked in (True, False):
        torch.manual_seed(0)
        model = _TinyModel()
        targets = torch.tensor([1, 2, 3])
        if chunked:
            with LogprobHead(model, 2).query(torch.arange(3), targets, temperature=1.0):
                logprobs = model(torch.tensor([[4, 5, 6]]))[0]
        else:
            logprobs = model(torch.tensor([[4, 5, 6]]))[0].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        logprobs.sum().backward()
        gradients.append(model.embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_head_that_is_not_linear_is_refused() -> None:
    with pytest.raises(LearnerError, match="output head Sequential"):
        LogprobHead(_TinyModel(linear_head=False), 8)

"""Every layout gives a sequence the log-probabilities that it has alone, in all three model families."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, DeepseekV3Config, GlmMoeDsaConfig, Llama4TextConfig

from launch.tiny_models import FAMILIES, Family, build_tiny_model
from rl.batch import TokenSequence
from rl.batching import Layout
from rl.errors import LearnerError
from rl.layouts import MicroBatch, collate, refuse_inexact_layout, resolve_layout
from rl.learner_checks import check_layout
from rl.logprobs import LogprobHead
from rl.models import choose_attention
from rl.moe import Routers
from rl.shared_prefix import ATTENTION, use_shared_prefixes

LENGTHS = ((5, 30), (3, 20), (9, 2), (1, 41), (4, 1))  # prompt and response; longer than the sliding window of 16
RUNS: list[tuple[Family, str, Layout]] = [
    (family, attention, layout)
    for family in FAMILIES
    for attention in (("eager",) if family == "gpt_oss" else ("eager", "sdpa"))
    for layout in get_args(Layout)
    if layout != "shared_prefix" or attention == "sdpa"
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small spend their time waiting for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def _checkpoint(family: Family, directory: Any) -> Any:
    return build_tiny_model(family, directory / family)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.getbasetemp() / "layouts"

    def load(family: Family, attention: str = "eager") -> Any:
        path = _checkpoint(family, directory)
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, dtype=torch.float32).eval()

    return load


def sequences(experts: tuple[int, int] | None = None, *, siblings: bool = False) -> list[TokenSequence]:
    """Random sequences; with `experts` (layers, experts in all) each also has two random experts a token and layer.

    With `siblings`, each of them is there three times with the same prompt, in turns, and responses of other lengths.
    """
    generator = np.random.default_rng(1)
    result = []
    for prompt, response in LENGTHS:
        routed = None
        if experts is not None:
            shape = (prompt + response - 1, experts[0], experts[1])
            routed = np.argsort(generator.random(shape), axis=-1)[..., :2].astype(np.int16)
        result.append(
            TokenSequence(
                generator.integers(0, 250, prompt).astype(np.int32),
                generator.integers(0, 250, response).astype(np.int32),
                routed,
            )
        )
    if siblings:
        for sequence in (*result, *result):
            length = int(generator.integers(1, 25))
            response = generator.integers(0, 250, length).astype(np.int32)
            result.append(TokenSequence(sequence.prompt_ids.copy(), response))
    return result


@torch.no_grad()
def run(model: Any, head: LogprobHead, micro: MicroBatch) -> list[Tensor]:
    with head.query(micro.positions, micro.targets, temperature=1.0):
        return micro.split(model(**micro.model_inputs).logits[0])


@torch.no_grad()
def alone(model: Any, sequence: TokenSequence) -> Tensor:
    """The textbook form: all logits of one sequence, nothing left out."""
    tokens = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
    logprobs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, tokens[1:, None])[len(sequence.prompt_ids) - 1 :, 0]


@pytest.mark.parametrize(("family", "attention", "layout"), RUNS)
def test_a_layout_is_exact(load: Any, family: Family, attention: str, layout: Layout) -> None:
    model = load(family, attention)
    chosen = sequences(siblings=True)
    expected = [alone(model, s) for s in chosen]
    micro = collate(chosen, layout, model_config=model.config, device="cpu")
    if layout == "shared_prefix":
        use_shared_prefixes(model)
    for found, reference in zip(run(model, LogprobHead(model, 16), micro), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-5)


def test_prompts_are_shared_where_values_have_a_size_of_their_own() -> None:
    """DeepSeek's latent attention: keys of 16 + 8 dimensions, values of 20."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=20,
        attn_implementation="sdpa",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    chosen = sequences(siblings=True)
    expected = [alone(model, s) for s in chosen]
    use_shared_prefixes(model)
    micro = collate(chosen, "shared_prefix", model_config=config, device="cpu")
    for found, reference in zip(run(model, LogprobHead(model, 16), micro), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_shared_prompts_have_the_gradients_of_sequences_alone(load: Any, family: Family, window: int | None) -> None:
    """Also with a sliding window that is shorter than most sequences."""
    model = load(family, "sdpa")
    if window is not None:
        _slide(model, window)
    chosen = sequences(siblings=True)

    def gradients() -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    weights = [torch.cos(torch.arange(len(s.response_ids), dtype=torch.float32) + i) for i, s in enumerate(chosen)]
    for sequence, weight in zip(chosen, weights, strict=True):
        (alone.__wrapped__(model, sequence) * weight).sum().backward()  # type: ignore[attr-defined]
    expected = gradients()
    use_shared_prefixes(model)
    micro = collate(chosen, "shared_prefix", model_config=model.config, device="cpu")
    with LogprobHead(model, 16).query(micro.positions, micro.targets, temperature=1.0):
        logprobs = model(**micro.model_inputs).logits[0]
        (logprobs * torch.cat(weights)).sum().backward()
    found = gradients()
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        torch.testing.assert_close(found[name], reference, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert float(expected["model.embed_tokens.weight"].abs().max()) > 0.1


def _slide(model: Any, window: int) -> None:
    """Every layer of a Qwen3 model sees the last `window` tokens only."""
    model.config.sliding_window = window
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    model.model.has_sliding_layers = True
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
        layer.attention_type = "sliding_attention"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=9))
def test_a_shared_row_holds_each_prompt_once_and_every_token_in_its_place(made_of: list[tuple[int, int]]) -> None:
    prompts = [np.arange(10 * p, 10 * p + 2 + p, dtype=np.int32) for p in range(4)]
    chosen = [
        TokenSequence(prompts[p], np.arange(100 * i + 50, 100 * i + 50 + r, dtype=np.int32))
        for i, (p, r) in enumerate(made_of)
    ]
    config = SimpleNamespace(model_type="qwen3", _attn_implementation="sdpa")
    micro = collate(chosen, "shared_prefix", model_config=config, device="cpu")
    row, positions = micro.model_inputs["input_ids"][0], micro.model_inputs["position_ids"][0]
    used = {p for p, _ in made_of}
    assert len(row) == sum(len(prompts[p]) for p in used) + sum(r - 1 for _, r in made_of)
    assert micro.real.all()
    for sequence, places in zip(chosen, micro.split(micro.positions), strict=True):
        whole = [*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()]
        for step, place in enumerate(places.tolist()):
            length = len(sequence.prompt_ids) + step
            assert (int(row[place]), int(positions[place])) == (whole[length - 1], length - 1)
    # Attention finds every sequence whole, and its results find back to the row.
    shared = micro.model_inputs["shared_prefixes"]
    rows = [row[places].tolist() for table in shared.tables for places in table]
    for sequence in chosen:
        whole = [*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()][:-1]
        assert any(found[: len(whole)] == whole for found in rows)
    assert torch.equal(torch.cat([table.flatten() for table in shared.tables])[shared.results], torch.arange(len(row)))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_recorded_experts_are_used_again_bit_for_bit(load: Any, family: Family, layout: Layout) -> None:
    """Another model (the routers have moved) replays what the first one chose, and the choice is exactly that."""
    model = load(family)
    routers, head = Routers(model, "cpu"), LogprobHead(model, 16)
    plain = collate(sequences(), layout, model_config=model.config, device="cpu")
    with routers.forward_pass(plain.real):
        original = run(model, head, plain)
        recorded = torch.stack([routers._pass.seen[layer][1] for layer in range(2)], dim=1)  # type: ignore[union-attr]
    with routers.forward_pass(plain.real, experts=recorded):
        replayed = run(model, head, plain)
    assert all(torch.equal(a, b) for a, b in zip(original, replayed, strict=True))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "gate.weight" in name:
                parameter.neg_()  # every choice is another one now
    with routers.forward_pass(plain.real):
        differing = run(model, head, plain)
    assert max(float((a - b).abs().max()) for a, b in zip(original, differing, strict=True)) > 1e-2
    with routers.forward_pass(plain.real, experts=recorded):
        run(model, head, plain)
        seen = torch.stack([routers._pass.seen[layer][1] for layer in range(2)], dim=1)  # type: ignore[union-attr]
    assert torch.equal(seen, recorded)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_from_samples_follow_their_tokens_into_every_layout(load: Any, family: Family) -> None:
    model = load(family, "eager" if family == "gpt_oss" else "sdpa")
    routers, head = Routers(model, "cpu"), LogprobHead(model, 16)
    samples = sequences(experts=(2, 4))

    def replay(chosen: list[TokenSequence], layout: Layout) -> list[Tensor]:
        micro = collate(chosen, layout, model_config=model.config, device="cpu")
        with routers.forward_pass(micro.real, experts=micro.routed_experts):
            return run(model, head, micro)

    expected = [replay([s], "bucketed")[0] for s in samples]
    for layout in get_args(Layout)[: 2 if family == "gpt_oss" else 3]:
        micro = collate(samples, layout, model_config=model.config, device="cpu")
        assert micro.routed_experts is not None
        for found, sample in zip(micro.split(micro.routed_experts[micro.positions]), samples, strict=True):
            assert found.tolist() == sample.routed_experts[-len(found) :].tolist()  # type: ignore[index]
        if layout == "shared_prefix":
            use_shared_prefixes(model)
        for found, reference in zip(replay(samples, layout), expected, strict=True):
            torch.testing.assert_close(found, reference, rtol=0, atol=1e-5)


def test_routers_are_measured_over_real_tokens_and_balanced_by_them(load: Any) -> None:
    model = load("qwen3_moe")
    routers, head = Routers(model, "cpu"), LogprobHead(model, 16)
    micro = collate(sequences(), "bucketed", model_config=model.config, device="cpu")
    assert not bool(micro.real.all())
    with routers.forward_pass(micro.real, measure=True):
        run(model, head, micro)
        balance = routers.aux_loss()
        seen = [routers._pass.seen[layer] for layer in range(2)]  # type: ignore[union-attr]
    chosen = [(logits[micro.real].softmax(-1), experts[micro.real]) for logits, experts in seen]
    counts = [torch.stack([(experts == e).sum() for e in range(probs.shape[1])]) for probs, experts in chosen]
    load_sums, entropy, tokens = routers.take_sums()
    assert tokens == int(micro.real.sum())
    assert torch.equal(load_sums, torch.stack(counts).double())
    expected = torch.stack([-(probs * probs.log()).sum() for probs, _ in chosen])
    torch.testing.assert_close(entropy, expected.double(), rtol=1e-5, atol=1e-5)
    losses = [probs.shape[1] * (c / tokens * probs.mean(0)).sum() for (probs, _), c in zip(chosen, counts, strict=True)]
    torch.testing.assert_close(balance, torch.stack(losses).mean())
    assert routers.take_sums()[2] == 0


def test_prompts_with_other_experts_are_not_shared(load: Any) -> None:
    """The sampler may have computed a group's prompt twice, and rounding chosen another expert: each sample is replayed
    with its own record, whichever it meets in a micro-batch."""
    model = load("qwen3_moe", "sdpa")
    routers, head = Routers(model, "cpu"), LogprobHead(model, chunk_tokens=64)
    one = sequences(experts=(len(routers), 4))[0]
    assert one.routed_experts is not None
    other = TokenSequence(one.prompt_ids.copy(), one.response_ids[::-1].copy(), one.routed_experts[..., ::-1].copy())
    twin = TokenSequence(one.prompt_ids.copy(), other.response_ids, one.routed_experts.copy())

    def replay(chosen: list[TokenSequence], layout: Layout) -> list[Tensor]:
        micro = collate(chosen, layout, model_config=model.config, device="cpu")
        with routers.forward_pass(micro.real, experts=micro.routed_experts):
            return run(model, head, micro)

    expected = [replay([s], "bucketed")[0] for s in (one, other, twin)]
    use_shared_prefixes(model)
    for found, reference in zip(replay([one, other, twin], "shared_prefix"), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-5)
    micro = collate([one, other, twin], "shared_prefix", model_config=model.config, device="cpu")
    assert len(micro.real) == 2 * one.num_positions + len(one.response_ids) - 1


def test_positions_and_targets_point_at_the_response() -> None:
    config = SimpleNamespace(model_type="qwen3", _attn_implementation="sdpa")
    two = [
        TokenSequence(np.array([1, 2], dtype=np.int32), np.array([3, 4], dtype=np.int32)),
        TokenSequence(np.array([5], dtype=np.int32), np.array([6], dtype=np.int32)),
    ]
    bucketed = collate(two, "bucketed", model_config=config, device="cpu")
    assert bucketed.model_inputs["input_ids"].tolist() == [[1, 2, 3], [5, 0, 0]]
    assert bucketed.positions.tolist() == [1, 2, 3]
    assert bucketed.real.tolist() == [True, True, True, True, False, False]
    packed = collate(two, "packed", model_config=config, device="cpu")
    assert packed.model_inputs["input_ids"].tolist() == [[1, 2, 3, 5]]
    assert packed.model_inputs["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert packed.positions.tolist() == [1, 2, 3]
    for micro in (bucketed, packed):
        assert micro.targets.tolist() == [3, 4, 6]
        assert micro.sequence_index.tolist() == [0, 0, 1]
        assert [v.tolist() for v in micro.split(torch.tensor([7, 8, 9]))] == [[7, 8], [9]]


def test_the_leak_test_passes_exact_layouts_and_refuses_a_leaking_one(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(family: Family, layout: Layout) -> None:
        model = load(family, "sdpa" if layout == "shared_prefix" else "eager")
        if layout == "shared_prefix":
            use_shared_prefixes(model)
        engine = _Engine(model)
        check_layout(engine, LogprobHead(model, 16), layout, device=torch.device("cpu"), dtype=torch.float32)

    for layout in ("bucketed", "packed"):
        check("gpt_oss", layout)
    check("qwen3_moe", "shared_prefix")
    monkeypatch.setattr("rl.layouts._NEEDS_EXPLICIT_MASKS", ())  # what GPT-OSS does by itself: sequences see each other
    with pytest.raises(LearnerError, match="packed layout is not exact for GptOssForCausalLM with eager attention"):
        check("gpt_oss", "packed")


def test_a_model_that_adds_noise_while_it_trains_is_refused(load: Any) -> None:
    model = load("qwen3")
    engine = _Engine(model, after=lambda logits: logits + model.training * torch.randn_like(logits))
    with pytest.raises(LearnerError, match="Qwen3ForCausalLM computes something else in training mode"):
        check_layout(engine, LogprobHead(model, 16), "bucketed", device=torch.device("cpu"), dtype=torch.float32)


def test_the_leak_test_finds_logits_that_change_after_the_head(load: Any) -> None:
    model = load("qwen3")
    head = LogprobHead(model, 16)
    engine = _Engine(model, after=lambda output: 0.5 * output if output.shape[0] == 1 else output)
    with pytest.raises(LearnerError, match="the model is not supported"):
        check_layout(engine, head, "bucketed", device=torch.device("cpu"), dtype=torch.float32)


# Rounding sends tokens to other experts, so that of their models may go further.
@pytest.mark.parametrize(
    ("family", "small", "large", "most"), [("qwen3", 0.1, 2.0, "3e-01"), ("qwen3_moe", 0.5, 10.0, "1e.00")]
)
def test_rounding_that_comes_with_the_number_of_rows_is_no_leak(
    load: Any, monkeypatch: pytest.MonkeyPatch, family: Family, small: float, large: float, most: str
) -> None:
    model = load(family).to(torch.bfloat16)
    head = LogprobHead(model, 16)
    rows: list[int] = []
    size = small

    def round_by_rows(_: Any, inputs: Any, output: Any) -> Any:
        rows.append(len(inputs[0]))
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(rows[-1]))
        return output + (size * output.std() * noise).to(output)

    model.model.embed_tokens.register_forward_hook(round_by_rows)

    def check() -> None:
        check_layout(_Engine(model), head, "bucketed", device=torch.device("cpu"), dtype=torch.bfloat16)

    check()
    assert set(rows) == {1, 3}
    with monkeypatch.context() as patch:
        patch.setattr("rl.learner_checks._ROUNDINGS", 0.0)
        with pytest.raises(LearnerError, match="differs from what .* the same sequence alone .* .allowed 5e-02."):
            check()
    size = large
    with pytest.raises(LearnerError, match=f"differs from what .* the same sequence alone .* .allowed {most}."):
        check()


class _Engine:
    """As much of a DeepSpeed engine as the check uses."""

    def __init__(self, module: Any, after: Any = lambda logits: logits) -> None:
        self.module = module
        self._after = after

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self._after(self.module(**inputs).logits))


def test_a_model_that_cannot_pack_exactly_is_refused() -> None:
    config = SimpleNamespace(model_type="gpt_oss", _attn_implementation="flex_attention", sliding_window=4)
    with pytest.raises(LearnerError, match="set learner.layout to bucketed"):
        collate(sequences(), "packed", model_config=config, device="cpu")


def test_prompts_are_shared_with_sdpa_only(load: Any) -> None:
    with pytest.raises(LearnerError, match="gpt_oss runs with eager; set learner.layout to bucketed or packed"):
        use_shared_prefixes(load("gpt_oss"))
    model = load("gpt_oss")
    model.config._attn_implementation = ATTENTION
    with pytest.raises(LearnerError, match="attention with s_aux cannot share prompts"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(LearnerError, match="gpt_oss runs with eager; set learner.layout to bucketed or packed"):
        refuse_inexact_layout("shared_prefix", config=model.config, attention="eager")


def test_prompts_are_not_shared_where_a_model_says_more_than_causality() -> None:
    """GLM-5's attention looks at the tokens that it chose, by a mask of its own; an encoder looks at later ones."""
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    latent: dict[str, Any] = {
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "mlp_layer_types": ["dense"],
    }
    for config, what in (
        (GlmMoeDsaConfig(**sizes, **latent, intermediate_size=32), "a mask of its own"),
        (BertConfig(**sizes, intermediate_size=32, is_decoder=False), "a view of later tokens"),
    ):
        config._attn_implementation = "sdpa"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        use_shared_prefixes(model)
        micro = collate(sequences(siblings=True), "shared_prefix", model_config=model.config, device="cpu")
        with pytest.raises(LearnerError, match=f"attention with {what} cannot share prompts; set learner.layout"):
            model(**micro.model_inputs)


def test_the_leak_test_compares_shared_prompts_with_the_models_own_attention(load: Any) -> None:
    """Where the two differ, in every sequence alike, comparing sharing with itself would find nothing."""
    model = load("qwen3", "sdpa")
    use_shared_prefixes(model)
    own = model.model.layers[0].self_attn.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        output, weights = own(*arguments, **options)
        return (output if model.config._attn_implementation == "sdpa" else 2 * output), weights

    model.model.layers[0].self_attn.forward = forward
    with pytest.raises(LearnerError, match="the shared_prefix layout is not exact for Qwen3ForCausalLM"):
        check_layout(
            _Engine(model), LogprobHead(model, 16), "shared_prefix", device=torch.device("cpu"), dtype=torch.float32
        )
    assert model.config._attn_implementation == ATTENTION


def test_chunks_are_not_packed() -> None:
    """transformers would cut them where the row's positions are: sequences behind the first see less or more."""
    config = Llama4TextConfig(attention_chunk_size=64)
    refuse_inexact_layout("bucketed", config=config, attention="sdpa")
    with pytest.raises(LearnerError, match="llama4_text attends in chunks, and in a packed row .* bucketed"):
        refuse_inexact_layout("packed", config=config, attention="sdpa")


def test_sequences_without_prompt_or_response_are_refused() -> None:
    empty = np.empty(0, dtype=np.int32)
    config = SimpleNamespace(model_type="qwen3", _attn_implementation="sdpa")
    for sequence in (
        TokenSequence(empty, np.ones(2, dtype=np.int32)),
        TokenSequence(np.ones(2, dtype=np.int32), empty),
    ):
        with pytest.raises(LearnerError, match="at least one of each"):
            collate([sequence], "bucketed", model_config=config, device="cpu")


def test_experts_of_the_wrong_shape_or_of_some_samples_only_are_refused() -> None:
    config = SimpleNamespace(model_type="qwen3_moe", _attn_implementation="sdpa")
    good, bad = sequences(experts=(2, 4))[:2]
    with pytest.raises(LearnerError, match="needs all or none"):
        collate([good, sequences()[1]], "packed", model_config=config, device="cpu")
    short = TokenSequence(bad.prompt_ids, bad.response_ids, bad.routed_experts[:-1])  # type: ignore[index]
    with pytest.raises(LearnerError, match=r"shape \(21, 2, 2\); this sequence needs \(22, 2, 2\)"):
        collate([good, short], "packed", model_config=config, device="cpu")


def test_auto_packs_only_with_a_variable_length_kernel_and_shares_prompts_on_a_cpu() -> None:
    assert resolve_layout("auto", attention="flash_attention_2", device="cuda") == "packed"
    assert resolve_layout("auto", attention="sdpa", device="cuda") == "bucketed"
    assert resolve_layout("auto", attention="sdpa", device="cpu") == "shared_prefix"
    assert resolve_layout("auto", attention="eager", device="cpu") == "bucketed"
    assert resolve_layout("packed", attention="sdpa", device="cpu") == "packed"


def test_attention_is_chosen_by_model_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = type("Dense", (), {"_supports_flash_attn": True, "_supports_sdpa": True})
    sinks = type("Sinks", (), {"_supports_flash_attn": True, "_compatible_flash_implementations": ["kernels/x"]})
    monkeypatch.setattr("rl.models.is_flash_attn_3_available", lambda: False)
    monkeypatch.setattr("rl.models.is_flash_attn_2_available", lambda: True)
    assert choose_attention("auto", dense, "cuda", "bfloat16") == "flash_attention_2"
    assert choose_attention("auto", dense, "cuda", "float32") == "sdpa"
    assert choose_attention("auto", dense, "cpu", "bfloat16") == "sdpa"
    assert choose_attention("auto", sinks, "cuda", "bfloat16") == "eager"
    assert choose_attention("flex_attention", sinks, "cuda", "float32") == "flex_attention"

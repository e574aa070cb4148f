"""Fast text attention equals transformers in values and gradients, and computes keys once per image inside `reading`."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextSelfAttention

from lora_blip.kernels import switch
from lora_blip.kernels.sdpa import attend
from lora_blip.kernels.text_attention import TextAttention, reading

WIDTH, HEADS, STATE_WIDTH = 32, 4, 24  # width and heads of the text, width of the encoder states
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


def layer(crosses: bool = False, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> BlipTextSelfAttention:
    config = BlipTextConfig(
        hidden_size=WIDTH, encoder_hidden_size=STATE_WIDTH, num_attention_heads=HEADS, attention_probs_dropout_prob=dropout
    )
    return BlipTextSelfAttention(config, crosses, 0).to(dtype)


def quick(plain: BlipTextSelfAttention) -> TextAttention:
    """Return a fast copy with the same weights."""
    twin = copy.deepcopy(plain)
    switch.fast(twin)
    assert isinstance(twin, TextAttention)
    return twin


def hidden(shape: tuple[int, ...], share: float = 0.3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return an additive mask: the lowest number at a share of the positions, never at the first key."""
    away = torch.rand(shape) < share
    away[..., 0] = False
    return torch.zeros(shape, dtype=dtype).masked_fill(away, torch.finfo(dtype).min)


def outcome(module: nn.Module, x: torch.Tensor, **named: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, and the gradients of the input, the encoder states and the weights."""
    x = x.clone().requires_grad_()
    named = {key: value.clone().requires_grad_() if "hidden" in key else value for key, value in named.items()}
    module.zero_grad()
    out = module(x, **named)[0]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    states = [value.grad for key, value in named.items() if "hidden" in key]
    weights = [
        p.grad for name, p in module.named_parameters() if name != "key.bias"
    ]  # softmax ignores key.bias: its gradient is noise
    return [out.detach(), x.grad, *states, *weights]


def far(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value of each tensor."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-2)) for a, b in pairs)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("crosses", [False, True])
def test_values_and_gradients_equal_those_of_transformers(crosses, masked, dtype):
    """Self-attention and cross-attention agree with transformers, with and without a mask."""
    plain, x = layer(crosses, dtype), torch.randn(3, 7, WIDTH, dtype=dtype)
    named = {"encoder_hidden_states": torch.randn(3, 11, STATE_WIDTH, dtype=dtype)} if crosses else {}
    if masked:
        name, shape = ("encoder_attention_mask", (3, 1, 1, 11)) if crosses else ("attention_mask", (3, 1, 7, 7))
        named[name] = hidden(shape, dtype=dtype)
    expected = outcome(plain, x, **named)
    assert far(outcome(quick(plain), x, **named), expected) <= BOUND[dtype]
    if masked:
        assert far(outcome(quick(plain), x, **{k: v for k, v in named.items() if "mask" not in k}), expected) > BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fully_masked_rows_are_not_nan(dtype):
    """The output is the mean of the values, also with a float32 mask whose lowest number overflows in 16 bits."""
    q, k = (torch.randn(2, HEADS, count, 8).to(dtype) for count in (3, 5))
    output = attend(q, k, k, torch.full((2, 1, 3, 5), torch.finfo(torch.float32).min))
    torch.testing.assert_close(output.float(), k.float().mean(2, keepdim=True).expand_as(output), rtol=0.02, atol=0.02)


def test_attention_dropout_equals_that_of_transformers():
    plain, x = layer(dropout=0.5).train(), torch.randn(2, 5, WIDTH)
    twin = quick(plain)
    outputs = []
    for module in (plain, twin):
        torch.manual_seed(3)
        outputs.append(module(x)[0])
    assert torch.equal(*outputs) and not torch.equal(twin(x)[0], outputs[0])
    torch.testing.assert_close(twin.eval()(x)[0], plain.eval()(x)[0], rtol=1e-5, atol=1e-6)


def test_a_fast_module_keeps_its_parts_and_can_be_switched_back():
    """Hooks on query, key and value are called. The keys of the state_dict stay. Copies and pickles are fast."""
    plain = layer()
    twin = quick(plain)
    calls: list[str] = []
    for name in ("query", "key", "value"):
        getattr(twin, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    twin(torch.randn(1, 2, WIDTH))
    assert calls == ["query", "key", "value"] and isinstance(twin, BlipTextSelfAttention)
    assert list(twin.state_dict()) == list(plain.state_dict())
    other = pickle.loads(pickle.dumps(quick(plain)))
    assert type(other) is TextAttention and type(copy.deepcopy(other)) is TextAttention
    switch.fast(other, False)
    assert type(other) is BlipTextSelfAttention


# ---------------------------------------------------------------- reading


@pytest.fixture
def decoder() -> BlipTextLMHeadModel:
    torch.manual_seed(0)
    config = BlipTextConfig(
        vocab_size=50, hidden_size=WIDTH, encoder_hidden_size=STATE_WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return BlipTextLMHeadModel(config).eval()


def record_key_calls(decoder: BlipTextLMHeadModel) -> list[int]:
    """Return a list that records the number of images at each call of a key projection in cross-attention."""
    counts: list[int] = []
    for block in decoder.bert.encoder.layer:
        block.crossattention.self.key.register_forward_hook(lambda _m, args, _o: counts.append(len(args[0])))
    return counts


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_rows_of_an_image_equal_separate_rows(decoder, rows, fast):
    """Fast attention computes keys once per image, in the first call only. Nothing is cached after the block."""
    ids, states = torch.randint(50, (2 * rows, 5)), torch.randn(2, 6, STATE_WIDTH)
    expected = decoder(input_ids=ids, encoder_hidden_states=states.repeat_interleave(rows, 0)).logits
    switch.fast(decoder, fast)
    key_counts = record_key_calls(decoder)
    with reading(decoder, states, rows=rows) as source:
        logits = decoder(input_ids=ids, use_cache=False, **source).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        again = decoder(input_ids=ids, use_cache=False, **source).logits
    assert torch.equal(again, logits) and key_counts == ([2] * 2 if fast else [2 * rows] * 4)
    after = decoder(input_ids=ids, encoder_hidden_states=states.repeat_interleave(rows, 0).flip(1) * 2).logits
    assert not torch.allclose(after, expected, atol=1e-2)  # no state of the block is used


@torch.no_grad()
def test_padding_of_the_encoder_states_is_ignored(decoder):
    """Each row equals a separate call without the padding."""
    switch.fast(decoder)
    ids, states, mask = torch.randint(50, (2, 4)), torch.randn(2, 6, STATE_WIDTH), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with reading(decoder, states, mask) as source:
        logits = decoder(input_ids=ids, **source).logits
    for row, length in enumerate((6, 4)):
        with reading(decoder, states[row : row + 1, :length]) as source:
            alone = decoder(input_ids=ids[row : row + 1], **source).logits
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_copy_made_inside_reading_has_no_states(decoder):
    """A deepcopy or pickle reads the states that are passed to it, not those of the block."""
    switch.fast(decoder)
    ids, states = torch.randint(50, (1, 4)), torch.randn(2, 1, 6, STATE_WIDTH)
    with torch.no_grad(), reading(decoder, states[0]):
        for twin in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
            own = twin(input_ids=ids, encoder_hidden_states=states[1]).logits
            assert torch.allclose(own, logits_with(states[1], decoder, ids), atol=1e-5)


def logits_with(states: torch.Tensor, decoder: Any, ids: torch.Tensor) -> torch.Tensor:
    with reading(decoder, states) as source:
        return decoder(input_ids=ids, **source).logits


def test_a_recomputation_after_reading_is_an_error(decoder):
    """The arguments that `reading` returns raise RuntimeError after the block."""
    switch.fast(decoder)
    with reading(decoder, torch.randn(1, 6, STATE_WIDTH)) as source:
        pass
    with pytest.raises(RuntimeError, match="no image states"):
        decoder(input_ids=torch.randint(50, (1, 4)), **source)


@torch.no_grad()
def test_each_thread_reads_its_own_image(decoder):
    """Two threads inside `reading` of one decoder at the same time read the states of their own image."""
    switch.fast(decoder)
    ids, states, meet = torch.randint(50, (1, 4)), torch.randn(2, 1, 6, STATE_WIDTH), threading.Barrier(2, timeout=20)
    alone = [logits_with(each, decoder, ids) for each in states]

    @torch.no_grad()
    def read(own: torch.Tensor) -> torch.Tensor:
        with reading(decoder, own) as source:
            meet.wait()
            return decoder(input_ids=ids, **source).logits

    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(read, states), alone))


def reader(dtype: torch.dtype) -> BlipTextSelfAttention:
    """Return a cross-attention with two heads and wide states, for which few queries use the absorbed path."""
    torch.manual_seed(3)
    config = BlipTextConfig(hidden_size=32, encoder_hidden_size=64, num_attention_heads=2, attention_probs_dropout_prob=0.0)
    attention = BlipTextSelfAttention(config, True, 0)
    nn.init.normal_(attention.key.bias), nn.init.normal_(attention.value.bias)
    return attention.to(dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("masked", [False, True])
def test_few_queries_use_the_absorbed_path(dtype, masked, monkeypatch):
    """Outputs and gradients equal those of transformers, biases included. Many queries do not use the absorbed path."""
    torch.manual_seed(4)
    plain, x, states = reader(dtype), torch.randn(3, 5, 32, dtype=dtype), torch.randn(3, 40, 64, dtype=dtype)
    mask = {"encoder_attention_mask": hidden((3, 1, 1, 40), dtype=dtype)} if masked else {}
    fast, absorbed_calls = quick(plain), []
    monkeypatch.setattr(type(fast), "_absorbed", lambda *a, f=TextAttention._absorbed: absorbed_calls.append(1) or f(*a))
    named = {"encoder_hidden_states": states, **mask}
    assert far(outcome(fast, x, **named), outcome(plain, x, **named)) < BOUND[dtype] and absorbed_calls
    absorbed_calls.clear()
    many = torch.randn(3, 9, 32, dtype=dtype)
    assert far(outcome(fast, many, **named), outcome(plain, many, **named)) < BOUND[dtype] and not absorbed_calls


CHANGES = {
    "a backward hook": lambda linear: linear.register_full_backward_hook(lambda _m, dx, _dy: (2 * dx[0],)),
    "a backward pre-hook": lambda linear: linear.register_full_backward_pre_hook(lambda _m, dy: (2 * dy[0],)),
    "a replaced forward": lambda linear: setattr(linear, "forward", lambda x: 2 * nn.functional.linear(x, linear.weight)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["key", "value"])
def test_a_changed_key_or_value_does_not_use_the_absorbed_path(where, change, monkeypatch):
    fast, states = quick(reader(torch.float32)), torch.randn(2, 40, 64)
    CHANGES[change](getattr(fast, where))
    monkeypatch.setattr(type(fast), "_absorbed", lambda *_: pytest.fail("the absorbed path was used"))
    fast(torch.randn(2, 5, 32), encoder_hidden_states=states)


@pytest.mark.parametrize("where", ["key", "value"])
def test_a_hook_on_key_or_value_is_always_called(where):
    """If key or value has a hook, as of an adapter, the projection is called with every state."""
    fast, x, states = quick(reader(torch.float32)), torch.randn(2, 5, 32), torch.randn(2, 40, 64)
    lengths: list[int] = []
    getattr(fast, where).register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1]))
    fast(x, encoder_hidden_states=states)
    assert lengths == [40]

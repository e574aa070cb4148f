"""Fast attention of BLIP's text models is transformers' own, value and gradient, and a reader's keys are made once an image."""

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

WIDTH, HEADS, SEEN = 32, 4, 24  # of the text, and width of what it reads
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


def layer(crosses: bool = False, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> BlipTextSelfAttention:
    config = BlipTextConfig(
        hidden_size=WIDTH, encoder_hidden_size=SEEN, num_attention_heads=HEADS, attention_probs_dropout_prob=dropout
    )
    return BlipTextSelfAttention(config, crosses, 0).to(dtype)


def quick(plain: BlipTextSelfAttention) -> TextAttention:
    """A copy with the same weights, switched."""
    twin = copy.deepcopy(plain)
    switch.fast(twin)
    assert isinstance(twin, TextAttention)
    return twin


def hidden(shape: tuple[int, ...], share: float = 0.3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A mask to add: the least number on a share of the places, but not on the first key."""
    away = torch.rand(shape) < share
    away[..., 0] = False
    return torch.zeros(shape, dtype=dtype).masked_fill(away, torch.finfo(dtype).min)


def outcome(module: nn.Module, x: torch.Tensor, **named: torch.Tensor) -> list[torch.Tensor]:
    """The output, and gradients of the input, of what is read and of every weight."""
    x = x.clone().requires_grad_()
    named = {key: value.clone().requires_grad_() if "hidden" in key else value for key, value in named.items()}
    module.zero_grad()
    out = module(x, **named)[0]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    read = [value.grad for key, value in named.items() if "hidden" in key]
    learned = [p.grad for name, p in module.named_parameters() if name != "key.bias"]  # which softmax does not heed: noise
    return [out.detach(), x.grad, *read, *learned]


def far(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference, beside the largest value of each."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-2)) for a, b in pairs)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("crosses", [False, True])
def test_values_and_gradients_are_transformers_own(crosses, masked, dtype):
    """With a mask for each row and token, as packed texts have it, and without."""
    plain, x = layer(crosses, dtype), torch.randn(3, 7, WIDTH, dtype=dtype)
    named = {"encoder_hidden_states": torch.randn(3, 11, SEEN, dtype=dtype)} if crosses else {}
    if masked:
        name, shape = ("encoder_attention_mask", (3, 1, 1, 11)) if crosses else ("attention_mask", (3, 1, 7, 7))
        named[name] = hidden(shape, dtype=dtype)
    expected = outcome(plain, x, **named)
    assert far(outcome(quick(plain), x, **named), expected) <= BOUND[dtype]
    if masked:
        assert far(outcome(quick(plain), x, **{k: v for k, v in named.items() if "mask" not in k}), expected) > BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_fully_masked_are_not_nan(dtype):
    """Under a float32 mask too, whose least number 16 bits do not hold."""
    q, k = (torch.randn(2, HEADS, count, 8).to(dtype) for count in (3, 5))
    found = attend(q, k, k, torch.full((2, 1, 3, 5), torch.finfo(torch.float32).min))
    torch.testing.assert_close(found.float(), k.float().mean(2, keepdim=True).expand_as(found), rtol=0.02, atol=0.02)


def test_attention_dropout_is_that_of_transformers():
    plain, x = layer(dropout=0.5).train(), torch.randn(2, 5, WIDTH)
    twin = quick(plain)
    found = []
    for module in (plain, twin):
        torch.manual_seed(3)
        found.append(module(x)[0])
    assert torch.equal(*found) and not torch.equal(twin(x)[0], found[0])
    torch.testing.assert_close(twin.eval()(x)[0], plain.eval()(x)[0], rtol=1e-5, atol=1e-6)


def test_a_switched_module_is_the_same_module_and_can_be_switched_back():
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
        vocab_size=50, hidden_size=WIDTH, encoder_hidden_size=SEEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return BlipTextLMHeadModel(config).eval()


def keys_of(decoder: BlipTextLMHeadModel) -> list[int]:
    """Filled with how many images each layer's cross-attention makes keys of."""
    made: list[int] = []
    for block in decoder.bert.encoder.layer:
        block.crossattention.self.key.register_forward_hook(lambda _m, args, _o: made.append(len(args[0])))
    return made


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_rows_of_an_image_equal_separate_rows(decoder, rows, fast):
    """Whichever attention is on; keys are made once an image where it is the fast one."""
    ids, states = torch.randint(50, (2 * rows, 5)), torch.randn(2, 6, SEEN)
    expected = decoder(input_ids=ids, encoder_hidden_states=states.repeat_interleave(rows, 0)).logits
    switch.fast(decoder, fast)
    made = keys_of(decoder)
    with reading(decoder, states, rows=rows) as source:
        found = decoder(input_ids=ids, use_cache=False, **source).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        again = decoder(input_ids=ids, use_cache=False, **source).logits
    assert torch.equal(again, found) and made == ([2] * 2 if fast else [2 * rows] * 4)
    after = decoder(input_ids=ids, encoder_hidden_states=states.repeat_interleave(rows, 0).flip(1) * 2).logits
    assert not torch.allclose(after, expected, atol=1e-2)  # nothing is remembered behind the block


@torch.no_grad()
def test_padding_of_the_encoder_states_is_ignored(decoder):
    """A mask of ragged questions: each row as it reads without its padding."""
    switch.fast(decoder)
    ids, states, mask = torch.randint(50, (2, 4)), torch.randn(2, 6, SEEN), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with reading(decoder, states, mask) as source:
        found = decoder(input_ids=ids, **source).logits
    for row, length in enumerate((6, 4)):
        with reading(decoder, states[row : row + 1, :length]) as source:
            alone = decoder(input_ids=ids[row : row + 1], **source).logits
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_copy_made_inside_reading_has_no_states(decoder):
    switch.fast(decoder)
    ids, states = torch.randint(50, (1, 4)), torch.randn(2, 1, 6, SEEN)
    with torch.no_grad(), reading(decoder, states[0]):
        for twin in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
            own = twin(input_ids=ids, encoder_hidden_states=states[1]).logits
            assert torch.allclose(own, decoder_of(states[1], decoder, ids), atol=1e-5)


def decoder_of(states: torch.Tensor, decoder: Any, ids: torch.Tensor) -> torch.Tensor:
    with reading(decoder, states) as source:
        return decoder(input_ids=ids, **source).logits


def test_a_recomputation_after_reading_is_an_error(decoder):
    """The handle that `reading` gives stands for nothing by itself."""
    switch.fast(decoder)
    with reading(decoder, torch.randn(1, 6, SEEN)) as source:
        pass
    with pytest.raises(RuntimeError, match="no image states"):
        decoder(input_ids=torch.randint(50, (1, 4)), **source)


@torch.no_grad()
def test_each_thread_reads_its_own_image(decoder):
    """Two threads inside of `reading` at once, of one decoder."""
    switch.fast(decoder)
    ids, states, meet = torch.randint(50, (1, 4)), torch.randn(2, 1, 6, SEEN), threading.Barrier(2, timeout=20)
    alone = [decoder_of(each, decoder, ids) for each in states]

    @torch.no_grad()
    def read(own: torch.Tensor) -> torch.Tensor:
        with reading(decoder, own) as source:
            meet.wait()
            return decoder(input_ids=ids, **source).logits

    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(read, states), alone))


def reader(dtype: torch.dtype) -> BlipTextSelfAttention:
    """Two heads over wide states: few queries, as those of a short caption beside a picture."""
    torch.manual_seed(3)
    config = BlipTextConfig(hidden_size=32, encoder_hidden_size=64, num_attention_heads=2, attention_probs_dropout_prob=0.0)
    made = BlipTextSelfAttention(config, True, 0)
    nn.init.normal_(made.key.bias), nn.init.normal_(made.value.bias)
    return made.to(dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("masked", [False, True])
def test_a_few_queries_go_through_the_weights_and_not_every_state(dtype, masked, monkeypatch):
    """Neither keys nor values are made, and outputs and gradients are what these would lead to, biases included."""
    torch.manual_seed(4)
    plain, x, states = reader(dtype), torch.randn(3, 5, 32, dtype=dtype), torch.randn(3, 40, 64, dtype=dtype)
    mask = {"encoder_attention_mask": hidden((3, 1, 1, 40), dtype=dtype)} if masked else {}
    fast, ran = quick(plain), []
    monkeypatch.setattr(type(fast), "_absorbed", lambda *a, f=TextAttention._absorbed: ran.append(1) or f(*a))
    named = {"encoder_hidden_states": states, **mask}
    assert far(outcome(fast, x, **named), outcome(plain, x, **named)) < BOUND[dtype] and ran
    ran.clear()
    many = torch.randn(3, 9, 32, dtype=dtype)
    assert far(outcome(fast, many, **named), outcome(plain, many, **named)) < BOUND[dtype] and not ran


@pytest.mark.parametrize("where", ["key", "value"])
def test_a_hook_on_key_or_value_is_always_called(where):
    """With an adapter on keys or values, or anybody's hook, every state goes through it."""
    fast, x, states = quick(reader(torch.float32)), torch.randn(2, 5, 32), torch.randn(2, 40, 64)
    seen: list[int] = []
    getattr(fast, where).register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    fast(x, encoder_hidden_states=states)
    assert seen == [40]

"""The loss functions, packed rows and the frozen head equal sums that are computed by hand in float64."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_blip.kernels import head_loss as heads
from lora_blip.kernels.head_loss import head_loss, is_plain_head
from lora_blip.models.packing import PADDING, PackedRows, as_tensors, encoder_rows, rows_of
from lora_blip.models.token_rows import IGNORE, TokenRows
from lora_blip.tasks.losses import hard_negatives, itc_loss
from lora_blip.tasks.text_task import token_loss

# ---------------------------------------------------------------- next token


def token_loss_by_hand(logits: torch.Tensor, targets: torch.Tensor, weights: list[float]) -> float:
    total = 0.0
    for row, weight in enumerate(weights):
        for place, target in enumerate(targets[row].tolist()):
            if target != IGNORE:
                scores = logits[row, place].double()
                total -= weight * float(scores[target] - scores.exp().sum().log())
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weights", [None, [0.25, 2.0, 0.0]])
def test_the_token_loss_is_a_weighted_sum_over_the_labels(dtype, weights):
    """The token loss is Σ w · −log p over the labels, computed and returned in float32."""
    torch.manual_seed(0)
    logits = (20 * torch.randn(3, 4, 9)).to(dtype)
    targets = torch.tensor([[1, 2, IGNORE, 0], [IGNORE] * 4, [8, IGNORE, 3, 4]])
    loss = token_loss(logits, targets, None if weights is None else torch.tensor(weights))
    expected = token_loss_by_hand(logits, targets, weights or [1.0, 1.0, 1.0])
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(expected, rel=1e-6)


def test_ignore_is_the_ignored_label_of_pytorch_and_transformers():
    """PyTorch's cross-entropy and transformers' models ignore −100."""
    assert nn.CrossEntropyLoss().ignore_index == IGNORE


# ---------------------------------------------------------------- contrast and negatives


def test_the_contrast_is_computed_in_float32_for_every_dtype_and_divides_by_the_temperature():
    similarity = torch.tensor([[0.5, -0.25], [0.125, 1.0]])
    right = torch.eye(2, dtype=torch.bool)
    for temperature in (0.01, 2.0, torch.tensor(0.5)):
        loss = itc_loss(similarity.half(), right, temperature)
        s = (similarity.double() / float(temperature)).tolist()
        log = lambda row, i: row[i] - math.log(sum(map(math.exp, row)))  # noqa: E731
        columns = list(zip(*s, strict=True))
        expected = [-(log(s[i], i) + log(columns[i], i)) / 2 for i in range(2)]
        assert loss.dtype == torch.float32 and loss.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_hard_negative_is_the_most_similar_wrong_one_each_way():
    """Without sampling, a negative is the most similar wrong text or image, or −1 if there is none."""
    similarity = torch.tensor([[9.0, 1.0, 3.0], [7.0, 8.0, 2.0], [4.0, 6.0, 5.0]])
    right = torch.eye(3, dtype=torch.bool)
    text, image = hard_negatives(similarity, right, 1.0, sampled=False)
    assert (text.tolist(), image.tolist()) == ([2, 0, 1], [1, 2, 0])
    right[0] = True
    text, image = hard_negatives(similarity, right, 1.0, sampled=False)
    assert (text.tolist(), image.tolist()) == ([-1, 0, 1], [1, 2, 1])
    right[:, 1] = True
    text, image = hard_negatives(similarity, right, 1.0, sampled=False)
    assert (text.tolist(), image.tolist()) == ([-1, 0, 0], [1, -1, 1])


def test_every_wrong_text_can_be_drawn_and_the_temperature_sets_the_shares():
    """Every wrong text can be drawn. The temperature sets the shares, and the smallest weight is 1e-6 of the largest."""
    torch.manual_seed(0)
    draws = 4000
    right = torch.tensor([True, False, False]).expand(draws, 3)
    for temperature, low, high in ((1.0, 0.72, 0.78), (0.5, 0.87, 0.93), (1e-6, 0.999, 1.0)):
        similarity = torch.tensor([9.0, math.log(3.0), 0.0]).expand(draws, 3)
        text, _ = hard_negatives(similarity, right, temperature)
        assert low <= float((text == 1).float().mean()) <= high and not (text == 0).any()
    chances = []
    real = torch.empty_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda weights: chances.append(weights) or real(weights))
        hard_negatives(torch.tensor([[9.0, 5.0, 0.0]] * 3), torch.eye(3, dtype=torch.bool), 0.01)
    assert chances[0][0].tolist() == pytest.approx([0, 1, 1e-6]) and len(chances) == 2
    sampled = {tuple(hard_negatives(torch.zeros(4, 4), torch.eye(4, dtype=torch.bool), 1.0)[0].tolist()) for _ in range(20)}
    assert len(sampled) > 1  # drawn unless it is asked for the likeliest


# ---------------------------------------------------------------- packed rows


def tokens_of() -> TokenRows:
    """Return texts of 3, 1 and 2 tokens. The first and the last are about image 0."""
    targets = [[IGNORE, 7, 3], [IGNORE], [4, 3]]
    return TokenRows([[5, 6, 7], [8], [9, 4]], targets, [0, 1, 2], pad_id=1, weights=[0.5, 2.0, 3.0])


def pack(tokens: TokenRows, source: list[int]) -> PackedRows:
    """Return packed rows as BLIP packs them."""
    return as_tensors(rows_of(tokens, source, longest=sys.maxsize, share=False), tokens)


def test_packed_rows_by_hand():
    packed = pack(tokens_of(), [0, 1, 0])
    assert packed.ids.tolist() == [[5, 6, 7, 9, 4], [8, 1, 1, 1, 1]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert packed.text.tolist() == [[0, 0, 0, 2, 2], [1, *[PADDING] * 4]]
    labels = packed.labels
    assert labels.positions.tolist() == [1, 2, 3, 4] and labels.targets.tolist() == [7, 3, 4, 3]
    assert labels.weights is not None and labels.weights.tolist() == [0.5, 0.5, 3.0, 3.0]
    assert packed.label_ids() == [[7, 3], [], [4, 3]] and packed.encoder is None
    hidden = torch.finfo(torch.float16).min
    mask = packed.mask(torch.float16)
    assert mask.dtype == torch.float16 and mask.shape == (2, 1, 5, 5)
    sees = [[(i, j) for i in range(5) for j in range(5) if mask[p, 0, i, j] == 0] for p in range(2)]
    assert sees[0] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 3), (4, 3), (4, 4)]
    assert set(mask.unique().tolist()) == {0.0, hidden}


def test_an_encoder_s_input_is_padded_and_its_decoder_s_texts_are_packed():
    """An encoder-decoder's questions are padded, and the answers to one question are packed into one row."""
    answers, targets = [[5, 6], [8], [9, 4, 2]], [[6, 7], [8], [9, 4, 3]]
    tokens = TokenRows([[2, 3], [4]], targets, [0, 0, 1], pad_id=1, decoder_inputs=answers)
    rows = rows_of(tokens, tokens.example, longest=sys.maxsize, share=False)
    packed = as_tensors(rows, tokens, encoder_rows(tokens.inputs, tokens.pad_id, [0, 1]))
    assert packed.ids.tolist() == [[5, 6, 8], [9, 4, 2]] and packed.labels.targets.tolist() == [6, 7, 8, 9, 4, 3]
    assert packed.labels.weights is None and packed.label_ids() == targets
    assert packed.encoder is not None and packed.encoder.image is None and not packed.encoder.is_full
    assert packed.encoder.ids.tolist() == [[2, 3], [4, 1]] and packed.encoder.mask.tolist() == [[1, 1], [1, 0]]


def test_padded_rows_by_hand():
    """Padding has the pad id in the input, IGNORE in the targets and 0 in the mask. Labels are computed only on request."""
    rows = tokens_of().pad(with_labels=True)
    assert rows.input_ids.tolist() == [[5, 6, 7], [8, 1, 1], [9, 4, 1]]
    assert rows.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert rows.targets.tolist() == [[IGNORE, 7, 3], [IGNORE] * 3, [4, 3, IGNORE]]
    assert rows.weights.tolist() == [0.5, 2.0, 3.0] and rows.example is None and rows.decoder_input_ids is None
    assert rows.labels.positions.tolist() == [1, 2, 6, 7] and rows.labels.targets.tolist() == [7, 3, 4, 3]
    assert rows.labels.weights.tolist() == [0.5, 0.5, 3.0, 3.0] and rows.label_ids() == [[7, 3], [], [4, 3]]
    plain = replace(tokens_of(), weights=None)
    assert plain.pad(with_labels=True).labels.weights is None and plain.pad().labels is None
    assert plain.label_tokens == 4 and tokens_of().label_tokens == 2 * 0.5 + 2 * 3.0


def test_texts_of_one_example_share_its_values():
    tokens = TokenRows([[2, 3], [4]], [[6], [7], [8]], [0, 0, 1], pad_id=1, decoder_inputs=[[5], [5], [5]])
    rows = tokens.pad()
    assert rows.decoder_input_ids.tolist() == [[5], [5], [5]] and rows.input_ids.tolist() == [[2, 3], [4, 1]]
    assert rows.per_text(torch.tensor([10, 20])).tolist() == [10, 10, 20]


def test_rows_move_with_all_their_tensors():
    meta = torch.device("meta")
    for rows in (pack(tokens_of(), [0, 1, 0]).to(meta), tokens_of().pad(with_labels=True).to(meta)):
        tensors = [*vars(rows).values(), *vars(rows.labels).values()]
        assert all(value.is_meta for value in tensors if isinstance(value, torch.Tensor))
        assert sum(isinstance(value, torch.Tensor) for value in tensors) >= 6


# ---------------------------------------------------------------- the frozen head


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0, 1.0]])
@pytest.mark.parametrize(("states", "weight"), [("float32", "float32"), ("float16", "float32"), ("float32", "bfloat16")])
def test_the_loss_of_a_frozen_head_is_the_token_loss_of_its_logits(bias, weights, states, weight):
    torch.manual_seed(1)
    head = nn.Linear(5, 7, bias=bias).to(getattr(torch, weight)).requires_grad_(False)
    x = torch.randn(4, 5).to(getattr(torch, states)).requires_grad_()
    targets, w = torch.tensor([0, 6, 3, 3]), None if weights is None else torch.tensor(weights)
    loss = head_loss(x, head, targets, w)
    (gradient,) = torch.autograd.grad(2 * loss, x)
    wide = x.detach().to(head.weight.dtype).double().requires_grad_()
    plain = token_loss_double(wide, head, targets, w)
    (expected,) = torch.autograd.grad(2 * plain, wide)
    bound = 1e-5 if "16" not in states + weight else 3e-2
    assert loss.dtype == torch.float32 and gradient.dtype == x.dtype
    assert float(loss) == pytest.approx(float(plain), rel=bound)
    torch.testing.assert_close(gradient.double(), expected, rtol=bound, atol=bound)


def token_loss_double(x: torch.Tensor, head: nn.Linear, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    bias = 0 if head.bias is None else head.bias.double()
    logits = x @ head.weight.double().t() + bias
    each = logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]
    return (each if weights is None else each * weights.double()).sum()


def test_fp16_keeps_small_gradients_beside_large_ones():
    """Values down to 2⁻³⁴ of their row's sum survive the cast to fp16, also in a row of small values."""
    p = torch.tensor([[1.0, -1.0, 2.0**-33, 0.0], [2.0**-40, 2.0**-70, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scaled = p.clone()
    factors = heads.to_fp16_range(scaled)
    assert torch.equal(scaled.half().double() * factors.double()[:, None], p.double())


def test_the_head_computes_in_autocasts_dtype_and_reads_no_gradient_that_nobody_needs(monkeypatch):
    dtypes = []
    real = heads.product
    monkeypatch.setattr(heads, "product", lambda a, b, *rest: dtypes.append((a.dtype, b.dtype)) or real(a, b, *rest))
    head = nn.Linear(5, 7).requires_grad_(False)
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        for grad, products in ((True, 2), (False, 1)):
            dtypes.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = head_loss(torch.randn(4, 5, requires_grad=grad), head, torch.zeros(4, dtype=torch.long))
            assert dtypes == [(dtype, dtype)] * products and loss.requires_grad == grad


def test_a_gradient_of_the_heads_gradient_is_an_error_not_a_wrong_number():
    x = torch.randn(4, 5, requires_grad=True)
    loss = head_loss(x, nn.Linear(5, 7).requires_grad_(False), torch.zeros(4, dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss * x.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_only_a_frozen_linear_without_hooks_can_be_bypassed():
    def frozen() -> nn.Linear:
        return nn.Linear(5, 7).requires_grad_(False)

    hooked = frozen()
    hooked.register_forward_hook(lambda *_: None)
    subclass = type("Other", (nn.Linear,), {})(5, 7).requires_grad_(False)
    assert is_plain_head(frozen()) and not any(map(is_plain_head, (nn.Linear(5, 7), hooked, subclass, nn.Identity())))

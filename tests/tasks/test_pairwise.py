"""Settings that change arithmetic, in pairs: loss and gradients equal a model written out in float64, within a bound.

A covering array has every pair of values that are allowed together. The oracle is transformers' own forward pass in
float64, without hooks and without a fast path: ΔW is added to the weights by hand. Dropout masks and the negatives of
retrieval are recorded and used again.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.data.example import Example
from lora_blip.data.loader import CachedStates, HostBatch, Slot
from lora_blip.kernels import paths
from lora_blip.lora import attached, injection, targets
from lora_blip.lora.layer import LoRA
from lora_blip.lora.routing import use_adapters
from lora_blip.models import matching, weights
from lora_blip.models.compilation import compile_blocks
from lora_blip.models.loading import load_backbone, open_backbone
from lora_blip.models.precision import autocasting
from lora_blip.models.token_rows import IGNORE
from lora_blip.runtime.distributed import ALONE, Ranks, joined
from lora_blip.tasks import retrieval
from lora_blip.tasks.frozen_prefix import Prefix, first_adapted_block
from lora_blip.tasks.registry import TASKS, default_task
from lora_blip.training.learner import Learner
from lora_blip.training.loop import accumulate_gradients
from lora_blip.training.loss_scale import LossScaler
from tests.support import tiny
from tests.support.kill import run_processes

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": ("blip", "opt", "t5", "vqa", "itm", "itm2"),
    "precision": ("fp32", "bf16", "fp16"),
    "base": ("auto", "fp32", "16"),  # dtype of the frozen weights; 16: the precision's own, or bf16
    "targets": ("whole", "rows", "late"),  # every part; row blocks of the qkv; nothing in the first blocks
    "adapters": ("one", "two", "each"),  # each: every row of the batch has its own
    "texts": (1, 3),  # of a picture: 3 are packed into one row
    "fast": (True, False),
    "compile": (False, True),
    "checkpointing": (False, True),
    "prefix": (False, True),
    "accumulation": (1, 3),
    "ranks": (1, 2),
    "dropout": (0.0, 0.3),
    "large": (False, True),  # the ways of large models, whose thresholds no tiny model reaches
}
TARGETS = {  # kind → where adapters go
    "blip": {"whole": "vit,text:r=3", "rows": "vit.q,vit.v:r=3,text", "late": "vit[1:2],text"},
    "opt": {"whole": "vit,qformer,lm:r=3", "rows": "vit.q,vit.k,lm", "late": "lm"},
    "t5": {"whole": "vit,qformer,lm:r=3", "rows": "vit.k,vit.v,lm", "late": "qformer"},
    "vqa": {"whole": "vit,text:r=3", "rows": "vit.q,vit.v,text", "late": "text"},
    "itm": {"whole": "vit,text:r=3", "rows": "vit.q,vit.v,text", "late": "vit[1:2],text"},
    "itm2": {"whole": "vit,qformer:r=3", "rows": "vit.q,qformer", "late": "qformer"},
}
MATCHING = ("itm", "itm2")
WORDS = ["a red cube", "a", "two blue cubes on top of the table", "nothing", "a green cube", "a white picture"]
EPSILON = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
SCALE = 1024.0  # of the loss, in fp16
# About 100 roundings one after another lie between a picture and the gradient of its first adapter, each of them at random:
# √100 ε of the result, and six times as much for the layers whose outputs are far larger than what the loss sees of them
LOSS, GRADIENT = 4, 96  # T5 with two adapters in fp32 reached 77 on an EPYC of family 25


@dataclass(frozen=True)
class Case:
    kind: str
    precision: str
    base: str
    targets: str
    adapters: str
    texts: int
    fast: bool
    compile: bool
    checkpointing: bool
    prefix: bool
    accumulation: int
    ranks: int
    dropout: float
    large: bool

    @property
    def base_dtype(self) -> str:
        return self.base if self.base != "16" else "bf16" if self.precision == "fp32" else self.precision

    @property
    def epsilon(self) -> float:
        """Half the distance of 1 to the next number, in the coarsest dtype that is computed in."""
        computed = self.base_dtype if self.precision == "fp32" and self.base == "16" else self.precision
        return EPSILON[computed]

    def __str__(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in vars(self).values())


def allowed(values: dict[str, Any]) -> bool:
    """Return whether the values may be combined. Factors without a value exclude nothing."""
    has = values.get
    return not (
        (has("kind") == "t5" and has("precision") == "fp16")  # refused: T5 gives NaN
        or (has("prefix") and has("targets", "late") != "late")  # nothing comes before the first adapter
        or (has("compile") and has("dropout"))  # a compiled graph draws other masks
        or (has("adapters") == "each" and (has("kind") in MATCHING or has("texts") == 3))  # rows are pairs, or texts
        or (has("compile") and (has("kind") in ("t5", "opt", "vqa", "itm2") and has("targets") == "late"))  # no ViT block
        or (has("compile") and has("adapters") == "each")  # use_adapters is no setting of a training
    )


def pairs(case: dict[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(combinations(case.items(), 2))


def allowed_pairs() -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Return every pair of values that occurs in an allowed case."""
    some = {pair for a, b in combinations(FACTORS, 2) for pair in [((a, x), (b, y)) for x in FACTORS[a] for y in FACTORS[b]]}
    return {pair for pair in some if allowed(dict(pair)) and filled(dict(pair), random.Random(0))}


def filled(given: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return `given` completed to an allowed case with drawn values, or {} if there is none."""
    for _ in range(20):
        case = dict(given)
        for name in rng.sample([*FACTORS], len(FACTORS)):
            if name not in case:
                values = [value for value in FACTORS[name] if allowed(case | {name: value})]
                if not values:
                    break
                case[name] = rng.choice(values)
        else:
            return {name: case[name] for name in FACTORS}
    return {}


def covering(seed: int = 1, candidates: int = 30) -> list[Case]:
    """Return cases that cover every allowed pair. Each is the best of some drawn candidates for the first missing pair."""
    rng, missing, cases = random.Random(seed), allowed_pairs(), []
    for first in sorted(missing, key=str):
        if first not in missing:
            continue
        drawn = [filled(dict(first), rng) for _ in range(candidates)]
        best = max(drawn, key=lambda case: len(pairs(case) & missing) - 8 * case["compile"])  # which costs seconds
        missing -= pairs(best)
        cases.append(Case(**best))
    return cases


CASES = covering()


def test_every_allowed_pair_of_values_is_in_a_case():
    """The cases cover every allowed pair. There are at most 40 cases."""
    covered = {pair for case in CASES for pair in pairs(vars(case))}
    assert allowed_pairs() <= covered and all(allowed(vars(case)) for case in CASES)
    assert len(CASES) <= 40


# ---------------------------------------------------------------- what is learned from


def host_batches(case: Case) -> list[HostBatch]:
    """Return the micro-batches of a step: images with one or three texts, answers with unequal votes."""
    count = case.accumulation * case.ranks
    size = (12 if case.kind in MATCHING else 6) // count
    pixels = torch.randn(count * size, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(3))
    batches = []
    for number in range(count):
        places = range(number * size, (number + 1) * size)
        rows = [(place, text) for place in places for text in range(case.texts if place % 2 == 0 else 1)]
        examples = [example(case, place, text) for place, text in rows]
        if case.kind in MATCHING:  # whose rows have a picture each
            batches.append(HostBatch(examples, pixels[[place for place, _ in rows]]))
        else:
            picture = None if len(rows) == size else [place - places[0] for place, _ in rows]
            batches.append(HostBatch(examples, pixels[places.start : places.stop], picture))
    return batches


def example(case: Case, place: int, text: int) -> Example:
    caption = f"{WORDS[(place + text) % len(WORDS)]}{' on a table' * text}"
    image = Path(f"{place}.png")
    if case.kind != "vqa":
        return Example(image, caption, str(image), 1)
    answers = ("red", "blue", "blue") if place % 3 == 0 and case.adapters != "each" else (caption,)
    return Example(image, answers[0], str(image), 1, question=f"what is {WORDS[text]}?", answers=answers)


def names_of(case: Case, host_batch: HostBatch) -> list[str | None] | None:
    """Return the adapter of each row of a micro-batch."""
    some = ["default", "other", "default", None]
    return [some[row % 4] for row in range(len(host_batch.examples))] if case.adapters == "each" else None


def put_on(model: Any, case: Case) -> None:
    """Inject adapters whose values depend only on their address, so that every process and the oracle have the same."""
    where = TARGETS[case.kind][case.targets]
    injection.inject(model, targets.find(model, where, 2, 4.0), case.dropout)
    if case.adapters != "one":
        injection.inject(model, targets.find(model, where, 4, 2.0), case.dropout, name="other")
    for name in attached.names(model):
        for address, x in attached.adapters(model, name).items():
            generator = torch.Generator().manual_seed(int.from_bytes(f"{name} {address}".encode(), "little") % 2**31)
            for half, scale in ((x.A, 0.2), (x.B, 0.2)):
                half.data.copy_(scale * torch.randn(half.shape, generator=generator))


# ---------------------------------------------------------------- ours


@dataclass
class Record:
    """The random draws of one process: dropout masks by micro-batch, adapter and address; negatives; cached states."""

    masks: dict[tuple[int, str, str], list[Tensor]] = field(default_factory=dict)
    negatives: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    slot: int = 0


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Record every dropout mask and negative that is drawn inside the block, without those of a recomputation."""
    real_dropout, real_forward, real_negatives = F.dropout, LoRA.forward, retrieval.hard_negatives
    acting: list[LoRA] = []

    def forward(adapter: LoRA, x: Tensor) -> Tensor:
        acting.append(adapter)
        try:
            return real_forward(adapter, x)
        finally:
            acting.pop()

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not (p and training):
            return real_dropout(x, p, training, inplace)
        mask = real_dropout(torch.ones_like(x), p, True)
        if torch._C._current_graph_task_id() < 0:
            key = (record.slot, acting[-1].owner, acting[-1].site.address)  # type: ignore[attr-defined]
            record.masks.setdefault(key, []).append(mask.double())
        return x * mask

    def negatives(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        record.negatives[record.slot] = drawn = real_negatives(*arguments, **named)
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", dropout)
        patch.setattr(LoRA, "forward", forward)
        patch.setattr(retrieval, "hard_negatives", negatives)
        yield


def learn(case: Case, base: Path, ranks: Ranks = ALONE) -> tuple[float, dict[str, Tensor], Record]:
    """Return the loss of a training step, the unscaled gradients of the adapters, and the recorded draws."""
    backbone, precision = open_backbone(
        str(base), "cpu", case.precision, case.base_dtype, checkpointing=case.checkpointing, fast=case.fast
    )
    task, model = TASKS[default_task(backbone.architecture)](backbone), backbone.model
    put_on(model, case)
    for name in attached.names(model):
        for x in attached.adapters(model, name).values():
            x.owner = name  # type: ignore[assignment]
    attached.fast(model, case.fast)
    if case.base == "auto":
        weights.cast_once(backbone, precision)
    prefix = Prefix(task.encoder) if case.prefix else None
    model.train()
    first = first_adapted_block(model)[0]
    if case.compile:
        torch._dynamo.reset()
        backend = {"backend": "aot_eager"}  # the graphs of a training, without g++
        if not task.compile_loss(**backend):
            compile_blocks(model, first, **backend)
    learner = Learner(task, precision=precision, autocast=autocasting(backbone.device, precision), ranks=ranks)
    learner.scaler = LossScaler(precision == "fp16", SCALE)
    record, every = Record(), host_batches(case)
    slots = [Slot(number) for number in range(len(every))][ranks.rank :: ranks.count]
    some = [every[slot.number] for slot in slots]
    with recording(record):
        batches = []
        for slot, host_batch in zip(slots, some, strict=True):
            if case.prefix:
                with learner.autocast():
                    kept = prefix.compute_states(host_batch.pixel_values)[1]
                record.kept[slot.number] = kept
                host_batch = replace(
                    host_batch,
                    pixel_values=host_batch.pixel_values[1:],
                    cached_states=CachedStates(kept[:1], [0], [""] * (len(kept) - 1)),
                )
            batches.append(task.batch(host_batch, prefix))
        learner.begin_step(batches, slots)
        for batch, slot, host_batch in zip(batches, slots, some, strict=True):
            record.slot, names = slot.number, names_of(case, host_batch)
            with use_adapters(model, names) if names else nullcontext():
                accumulate_gradients(learner, batch, slot, is_last=slot is slots[-1])
    learner.scaler.unscale(learner.parameters.values())
    (loss,) = ranks.sum(float(learner.loss))
    return loss, {name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None}, record


def learn_among_ranks(case: Case, base: Path, folder: Path) -> tuple[float, dict[str, Tensor], Record]:
    def act() -> None:
        with joined() as ranks:
            torch.save(learn(case, base, ranks), folder / str(ranks.rank))

    assert run_processes(case.ranks, act) == [0] * case.ranks
    parts = [torch.load(folder / str(rank), weights_only=False) for rank in range(case.ranks)]
    whole = Record()
    for loss, gradients, record in parts:
        assert loss == parts[0][0] and all(torch.equal(gradients[key], parts[0][1][key]) for key in gradients)
        whole.masks |= record.masks
        whole.negatives |= record.negatives
        whole.kept |= record.kept
    return parts[0][0], parts[0][1], whole


# ---------------------------------------------------------------- the oracle


class Written(nn.Module):
    """A float64 linear that computes y = (W + Σ s B A) x + b, or each update separately if masks or rows need it."""

    def __init__(self, linear: Any, parts: list[tuple[str, str, Any, Tensor, Tensor]], oracle: "Oracle") -> None:
        super().__init__()
        self.weight, self.bias, self.parts, self.oracle = linear.weight, linear.bias, parts, oracle

    def forward(self, x: Tensor) -> Tensor:
        total, beside = self.weight, []
        for name, address, lora_, a, b in self.parts:
            above, below = lora_.padding
            if self.oracle.case.dropout or self.oracle.names:
                update = self.oracle.dropped(x, name, address) @ a.T @ b.T * lora_.scale
                beside.append(F.pad(update, (above, below)))
            else:
                total = total + F.pad(b @ a * lora_.scale, (0, 0, above, below))
        return sum(beside, F.linear(x, total, self.bias))


class Oracle:
    """The training step in float64."""

    def __init__(self, case: Case, base: Path, record: Record) -> None:
        self.case, self.record = case, record
        dtype = load_backbone(str(base), "cpu", opened_dtype(case), fast=False)
        self.first: tuple[int, bool] = (0, False)
        self.task: Any = TASKS[default_task(dtype.architecture)](dtype)
        dtype.fast = True  # only for the form of the batch
        self.model = dtype.model
        put_on(self.model, case)
        self.first = first_adapted_block(self.model)
        self.halves: dict[str, Tensor] = {}
        parts: dict[str, list[tuple[str, str, Any, Tensor, Tensor]]] = {}
        for name in attached.names(self.model):
            for address, x in attached.adapters(self.model, name).items():
                a, b = (half.detach().double().requires_grad_(name == "default") for half in (x.A, x.B))
                parts.setdefault(x.site.module, []).append((name, address, x, a, b))
                if name == "default":
                    self.halves |= {f"{address}.lora_A": a, f"{address}.lora_B": b}
        injection.eject(self.model)
        self.model.double()
        for path, adapters in parts.items():
            parent, _, child = path.rpartition(".")
            setattr(self.model.get_submodule(parent), child, Written(self.model.get_submodule(path), adapters, self))
        for number, parameter in enumerate(self.task.parameters()):
            parameter.data = parameter.data.double()
            self.halves[f"task.{number}"] = parameter
        self.names: list[str | None] = []
        self.calls: dict[tuple[int, str, str], int] = {}

    def step(self) -> tuple[float, dict[str, Tensor]]:
        total, count = 0.0, 0.0
        for number, host_batch in enumerate(host_batches(self.case)):
            self.slot, self.batch = number, self.task.batch(host_batch)
            self.names = names_of(self.case, host_batch) or []
            if self.case.kind not in MATCHING:
                prompts, pictures = self.about(host_batch)
                self.rows_of_packed = prompts if self.case.kind == "vqa" else pictures
            loss = self.matched() if self.case.kind in MATCHING else self.said()
            total, count = total + loss, count + self.batch.count
        (total / count).backward()  # type: ignore[attr-defined]
        return float(total / count), {name: half.grad for name, half in self.halves.items()}

    def about(self, host_batch: HostBatch) -> tuple[list[int], list[int]]:
        rows = self.batch.rows.padded()
        prompts = [*range(len(rows.targets))] if rows.example is None else rows.example.tolist()
        of = host_batch.image_index or range(len(host_batch.examples))
        return prompts, [of[i] for i in prompts]

    def image_states(self) -> Tensor:
        """Return the image states that the language side reads, computed from the cached states if there are any."""
        if not self.case.prefix:
            return self.task.encoder.encode_images(self.batch.pixel_values.double())
        first, beyond = self.first
        vision, x = self.model.vision_model, self.record.kept[self.slot].double()
        with torch.no_grad():
            states = vision.embeddings(self.batch.pixel_values.double())
            for block in vision.encoder.layers[:first]:
                states = block(states)
            if first == len(vision.encoder.layers):
                states = vision.post_layernorm(states)
            states = self.task.encoder.project_vision(states) if beyond else states
        assert (x - states).norm() <= 4 * max(self.case.epsilon, EPSILON["fp16"]) * states.norm()
        if beyond:
            return x
        for block in vision.encoder.layers[first:]:
            x = block(x)
        return self.task.encoder.project_vision(vision.post_layernorm(x) if first < len(vision.encoder.layers) else x)

    def said(self) -> Tensor:
        """Return Σ w · −log p over the label tokens."""
        rows = self.batch.rows.padded()
        logits = self.task.language.logits(self.batch.per_example(self.image_states()), rows)
        assert logits.dtype == torch.float64
        counts = rows.targets != IGNORE
        each = -logits.log_softmax(-1).gather(-1, rows.targets.masked_fill(~counts, 0)[..., None]).squeeze(-1)
        each = torch.where(counts, each, 0).sum(1)
        return (each if rows.weights is None else each * rows.weights.double()).sum()

    def matched(self) -> Tensor:
        """Return rows × (mean ITC + mean ITM) with the recorded negatives."""
        texts, matcher, image_states = self.batch.rows, self.task.matcher, self.batch.per_example(self.image_states())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matching, "projected", lambda head, states: head(states))  # ours rounds to float32
            similarity = matching.cosines(matcher.image_features(image_states), matcher.text_features(texts))
            text, image = self.record.negatives[self.slot]
            every = torch.arange(len(texts))
            images = torch.cat([every, every[text >= 0], image[image >= 0]])
            odds = matcher.matching(image_states[images], texts[torch.cat([every, text[text >= 0], every[image >= 0]])])
        assert odds.dtype == torch.float64
        right = retrieval.positives(self.batch.examples).double()
        logits = similarity / self.task.temperature
        ways = [(logits, right), (logits.T, right.T)]
        contrast = sum(-(own / own.sum(1, keepdim=True) * way.log_softmax(1)).sum() for way, own in ways) / 2
        signs = torch.where(torch.arange(len(odds)) < len(texts), 1.0, -1.0)
        return contrast + len(texts) * -F.logsigmoid(signs * odds).mean()

    def dropped(self, x: Tensor, name: str, address: str) -> Tensor:
        """Return x under the recorded dropout mask, with 0 in the rows on which the adapter does not act."""
        rows = None
        if self.names:
            repeats = len(x) // len(self.names)
            rows = torch.tensor(
                [repeats * row + n for row, own in enumerate(self.names) if own == name for n in range(repeats)],
                dtype=torch.long,
            )
            acting = torch.zeros(len(x), dtype=x.dtype)
            acting[rows] = 1
            x = x * acting.view(-1, *[1] * (x.ndim - 1))
        if not self.case.dropout:
            return x
        key = (self.slot, name, address)
        self.calls[key] = call = self.calls.get(key, -1) + 1
        if rows is not None and not len(rows):
            self.calls[key] -= 1  # an adapter of no row is not called
            return x
        return x * self.fitted(self.record.masks[key][call], x, address, rows)

    def fitted(self, mask: Tensor, x: Tensor, address: str, rows: Tensor | None) -> Tensor:
        """Return the mask in the shape of the plain forward pass."""
        if rows is not None:
            return torch.zeros_like(x).index_copy(0, rows, mask)
        if mask.shape == x.shape:
            return mask
        if address.endswith(("crossattention.self.key", "crossattention.self.value")):  # states that several texts read
            return mask[torch.tensor(self.rows_of_packed)]
        new, packed = torch.zeros_like(x), self.batch.rows
        where = packed.text >= 0
        new[packed.text[where], packed.positions[where]] = mask[where]
        return new


def opened_dtype(case: Case) -> str:
    """Return the dtype in which training loads the base."""
    if case.base != "auto":
        return case.base_dtype
    return case.precision if case.kind in ("opt", "t5", "itm2") else "fp32"


# ---------------------------------------------------------------- the comparison


SLOW = ("vqa", "itm", "opt", "t5", "itm2")  # `make slow` runs the cases of these bases


@pytest.mark.filterwarnings("ignore")  # of emulated 16 bits
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c.kind in SLOW)) for c in CASES], ids=str)
def test_a_step_equals_the_float64_oracle(checkpoints, tmp_path, monkeypatch, case):
    """Loss and adapter gradients of a step equal the float64 oracle within a number of roundings of the coarsest dtype."""
    if case.large:
        row = replace(paths.row(), onednn=0, onednn_narrow=0, gelu_bytes=0, by_heads=0)
        monkeypatch.setattr(paths.Current, "row", row)
    base = checkpoints[case.kind]
    loss, gradients, record = learn(case, base) if case.ranks == 1 else learn_among_ranks(case, base, tmp_path)
    oracle_loss, oracle = Oracle(case, base, record).step()
    assert abs(loss - oracle_loss) <= LOSS * case.epsilon * abs(oracle_loss)
    assert oracle.keys() == gradients.keys()
    norms = {name: float(g.norm()) for name, g in oracle.items()}
    errors = {name: float((gradients[name].double() - g).norm()) for name, g in oracle.items()}
    whole = math.hypot(*norms.values())
    assert math.hypot(*errors.values()) <= GRADIENT * case.epsilon * whole
    for name, error in errors.items():
        assert error <= GRADIENT * case.epsilon * (norms[name] + 0.3 * whole), name

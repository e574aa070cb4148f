"""What every task is: its own inputs, labels, loss, prediction and scores, over one backbone."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_blip.data.example import Example
from lora_blip.data.loader import CachedStates, HostBatch
from lora_blip.errors import ConfigError
from lora_blip.metrics.exact import exact_match
from lora_blip.models.loading import Backbone
from lora_blip.models.token_bounds import TokenBounds
from lora_blip.models.token_rows import many_ids, plain_ids, special_ids
from lora_blip.models.unknown_tokens import REMEDY, UnknownTokens
from lora_blip.runtime.untrusted import quoted

ONLY_UNKNOWN = f"is only unknown tokens for this model's tokenizer; {REMEDY}"


@dataclass(frozen=True)
class Generation:
    """How a text is written; an adapter carries the settings that it was validated with."""

    max_new_tokens: int = 40
    num_beams: int = 1
    do_sample: bool = False


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the model's device, made by `Task.batch` from a `HostBatch`."""

    examples: list[Example]
    pixel_values: Tensor  # (images without cached states, 3, H, W)
    rows: Any  # the tokenized texts; the type depends on the task
    count: float  # the summed loss is divided by the total of a step; a number of Python, so nothing waits for the device
    image_index: Tensor | None = None  # (examples,) the image of each example; None: example i has image i
    cached_states: CachedStates | None = None  # of images that are not in pixel_values
    packed: Any = None  # the same texts, packed for the fast loss

    @property
    def images(self) -> int:
        return len(self.pixel_values) + (len(self.cached_states.indices) if self.cached_states else 0)

    def per_example(self, of_images: Tensor) -> Tensor:
        """Return the row of each example's image: (images, …) → (examples, …)."""
        return of_images if self.image_index is None else of_images[self.image_index]


class Task:
    """A task over a backbone. Raises ConfigError for a prompt or a checkpoint that it cannot use."""

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]  # the checkpoints that can do it
    example_checkpoint: ClassVar[str]  # one of them
    one_pass_per_image: ClassVar[bool] = True  # the lines about an image are learned at one look at it
    score_names: ClassVar[tuple[str, ...]]  # what `scores` can give, more is better; the first picks the best adapter
    prompt: str
    generation: Generation

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        self.backbone, self.prompt, self.generation = backbone, prompt.strip(), generation or Generation()
        self.prefix: Any = None  # a `prefix.Prefix`, where what comes before the first adapter is kept
        if backbone.architecture not in self.architectures:
            raise ConfigError(
                f"task = {self.name!r}: {backbone.name!r} is a {backbone.architecture}; "
                f"give a checkpoint of {' or '.join(self.architectures)}, such as {self.example_checkpoint}"
            )
        image = getattr(backbone.model.config, "image_token_index", None)
        self.special_ids: set[Any] = special_ids(backbone.tokenizer) | ({image} - {None})
        self.prompt_warning = ""
        self.pretokenized: dict[str, list[int]] = {}  # tokens of the texts that will be checked next
        self.known_lengths: dict[str, int] = {}  # how many tokens such texts had, until `fit_generation` has used them

    def require_score(self, name: str) -> None:
        """ConfigError if validation gives no score of that name."""
        if name not in ("auto", "loss", *self.score_names):
            raise ConfigError(f"best_by = {name!r}: {self.name} has auto, loss, {', '.join(self.score_names)}")

    # ---- training

    def prepare_data(self, examples: list[Example]) -> None:
        """All lines of the data, before any of them is learned from."""

    def trim(self, example: Example) -> Example:
        """Return the example without a prompt at the start of its texts; the same object if there is none."""
        return example

    def check(self, example: Example) -> str:
        """Why a line cannot be learned from, or ""."""
        raise NotImplementedError

    def pretokenize(self, examples: list[Example]) -> None:
        """Tokenise together what `check` will ask about these lines, which takes half the time; nothing else changes."""
        some, longest = [self.texts_to_check(example) for example in examples], self.bounds.longest_word
        if longest:
            some = [texts for texts in some if not (joined := "".join(texts)).isascii() or len(joined) > longest]
        doubtful = sorted({text for texts in some for text in texts if text and not self.bounds.has_no_unknown(text)})
        self.pretokenized = many_ids(self.backbone.tokenizer, doubtful) if doubtful else {}
        self.unknown_tokens.note(self.pretokenized)
        self.known_lengths |= {text: len(ids) for text, ids in self.pretokenized.items()}

    def all_texts(self, example: Example) -> tuple[str, ...]:
        """The texts of a line."""
        return (example.text,)

    def unknown_report(self, examples: list[Example]) -> str:
        """Return the share of unknown tokens in the prompt and in lines that `expect` was given, with examples, or ""."""
        lines = ((example.line, self.all_texts(example)) for example in examples)
        return "\n".join(filter(None, [self.prompt_warning, self.unknown_tokens.report(lines)]))

    def texts_to_check(self, example: Example) -> tuple[str, ...]:
        """The texts that `check` may tokenise."""
        return (example.text,)

    @cached_property
    def bounds(self) -> TokenBounds:
        return TokenBounds(self.backbone.tokenizer, self.special_ids)

    @cached_property
    def unknown_tokens(self) -> UnknownTokens:
        return UnknownTokens(self.backbone.tokenizer, self.special_ids)

    def token_ids(self, text: str) -> list[int]:
        return self.pretokenized.get(text) or plain_ids(self.backbone.tokenizer, text)

    def text_problem(self, text: str, room: int) -> str:
        """Why a text cannot be learned or matched where there is room for so many tokens, or ""."""
        if self.bounds.at_most(text, room) <= room:
            return ""
        ids = self.token_ids(text)
        if self.unknown_tokens.nothing_left(ids):
            return f"the text {quoted(text)} {ONLY_UNKNOWN}"
        if len(ids) > room:
            return f"the text has {len(ids)} tokens, and the model has room for {room}"
        return self.special_token_problem(text, ids)

    def special_token_problem(self, text: str, ids: list[int]) -> str:
        """Why a text with a special token in it, <image> or [SEP], cannot be used, or ""."""
        found = [i for i in ids if i in self.special_ids]
        tokens = self.backbone.tokenizer.convert_ids_to_tokens(found[:1])
        return f"{text!r} holds {tokens[0]!r}, which means something else here" if found else ""

    def batch(self, host_batch: HostBatch) -> DeviceBatch:
        """Return the batch with its texts tokenized, on the model's device."""
        raise NotImplementedError

    def encode_batch(self, batch: DeviceBatch) -> Tensor:
        """What the vision side makes of each picture of a batch: for `loss` and `predict` both to go on from."""
        if batch.cached_states and self.prefix:
            return self.prefix.encode_images(batch.pixel_values, batch.cached_states)
        return self.encode_images(batch.pixel_values)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(pictures, 3, H, W) → what is read of each (pictures, states, width)."""
        raise NotImplementedError

    def project_vision(self, states: Tensor) -> Tensor:
        """`look`, from the ViT's output (pictures, tokens, width) on."""
        raise NotImplementedError

    def image_tensors(self, host_batch: HostBatch) -> dict[str, Any]:
        """The pictures of a batch, on the model's device."""
        device, cached = self.backbone.device, host_batch.cached_states
        return {
            "pixel_values": host_batch.pixel_values.to(device, non_blocking=True),
            "image_index": None if host_batch.image_index is None else torch.tensor(host_batch.image_index, device=device),
            "cached_states": cached and cached._replace(states=cached.states.to(device, non_blocking=True)),
        }

    def loss(self, batch: DeviceBatch, seen: Tensor | None = None) -> Tensor:
        """The summed loss, float32: divide by `batch.count` over the whole step. `seen`: of its pictures, if they were."""
        raise NotImplementedError

    def repeatable_loss(self, batch: DeviceBatch) -> Tensor:
        """`loss`, without anything that is drawn or chosen by what was computed: to compare two ways to compute it."""
        return self.loss(batch)

    def logits(self, batch: DeviceBatch) -> Tensor:
        """All that the batch makes the model say, in one tensor: for the proofs before the first step."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        """What is trained beside the adapters."""
        return []

    def wrong_labels(self, batch: DeviceBatch) -> str:
        """Why the labels of a batch are not its examples' own, or ""."""
        raise NotImplementedError

    def label_table(self, batch: DeviceBatch) -> str:
        """What the model reads and what it must say, for the user to look at."""
        raise NotImplementedError

    # ---- prediction

    def subject(self, example: Example) -> Any:
        """What one prediction is about: examples of one subject share it."""
        raise NotImplementedError

    def predict(self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None) -> list[Any]:
        """One prediction an example. `adapters` names the adapter of each row, None for the base."""
        raise NotImplementedError

    def predict_from_features(self, seen: Tensor, examples: list[Example]) -> list[Any]:
        """`predict`, from what was seen of each example's picture (examples, states, width) on."""
        raise NotImplementedError

    def encode_texts(self, texts: list[str]) -> Any:
        """Texts as `rank` takes them: what of them needs no image is computed once. Read again when adapters change."""
        return texts

    def rank(self, pixel_values: Tensor, examples: list[Example], texts: Any) -> Tensor:
        """How well each text fits each image, as a distribution: (images, texts), float32, every row sums to 1.

        texts: a list of them, or what `read` made of it.
        """
        raise NotImplementedError

    def scores(self, predictions: dict[Any, Any], examples: list[Example], wanted: str = "") -> dict[str, float]:
        """Figures by name, from subject → prediction; `wanted` names one that is not computed each time."""
        raise NotImplementedError

    def correctness(self, text: str, examples: list[Example]) -> float:
        """How right one text is, 0 to 1, for a subject with these lines: 1 if it is one of theirs."""
        return exact_match([text], [[example.text for example in examples]])

    def move(self, device: torch.device) -> None:
        """Go on computing on another device, in fp32."""
        self.backbone.model.to(device).float()
        self.backbone.device = device
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    # ---- what an adapter file says of its task

    def metadata(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_metadata(self, metadata: dict[str, Any]) -> None:
        """Take up what `metadata` kept beside the prompt and the generation."""

"""What every kind of language model does: makes rows of a prompt and a text, is run over what was seen, and writes."""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_blip.errors import ConfigError
from lora_blip.lora.layer import AdapterStack
from lora_blip.lora.routing import use_adapters
from lora_blip.models.distinct_images import distinct
from lora_blip.models.library import call
from lora_blip.models.packing import Packed
from lora_blip.models.token_rows import IGNORE, Rows, by_length, index_of, mask_of, pad, plain_ids, shifted_targets, special_ids

Adapters = list[str | None] | None  # the adapter of each row, None for the base; no list: all that are on
Named = dict[str, Any]  # arguments by name


class CutText(str):
    """A generated text without its end token: generation stopped at MAX_NEW_TOKENS, or where the model's positions end."""

    __slots__ = ()


class Language:
    """How one kind of language model reads a prompt and a text, is run, and generates.

    `see` runs the vision side once an image, `logits` runs the texts over what was seen: together they
    are the model's whole forward, and an image with five texts is looked at once.
    """

    model: Any
    tokenizer: Any
    pad_id: int
    start_id: int  # the token that a decoder starts from
    end_id: int  # the token that ends every text
    max_tokens: int  # tokens of a row, the image left out

    def prompt_ids(self, prompt: str) -> list[int]:
        """What the model has read before the first token of its text."""
        raise NotImplementedError

    def tokenize(self, prompts: list[str], texts: list[str], image: list[int] | None = None) -> Rows:
        """A row a text. `prompts` has one for each image, `image` says which one each text is about: i, without it."""
        raise NotImplementedError

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(images, 3, H, W) → what the language side reads of each image (images, states, width)."""
        return self.project_vision(call(self.model.vision_model, pixel_values=pixel_values).last_hidden_state)

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        """Logits (rows, tokens, vocabulary) of rows over `seen` (images, states, width)."""
        raise NotImplementedError

    def project_vision(self, states: Tensor) -> Tensor:
        """`see`, from the ViT's output (images, states, width) on."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Linear:
        """What turns the states of the text into logits."""
        raise NotImplementedError

    def pack(self, rows: Rows, prompt: list[int], picture: list[int]) -> Packed:
        """The rows as they are learned fastest; row i is about prompt `prompt[i]` and picture `picture[i]`."""
        raise NotImplementedError

    def label_states(self, seen: Tensor, each: Callable[[Tensor], Tensor], rows: Rows, packed: Packed) -> Tensor:
        """What `head` reads for each label, (labels, width), over what was seen of each picture.

        `each` gives every prompt what belongs to its picture.
        """
        raise NotImplementedError

    def logits_of_one_image(self, seen: Tensor, rows: Rows) -> Tensor:
        """`logits` of rows that are all about one image, `seen` (1, states, width)."""
        return self.logits(seen, rows)

    def encode_unique_images(self, pixel_values: Tensor, adapters: Adapters = None) -> Tensor:
        """(rows, 3, H, W) → what `see` makes of each row (rows, states, width); a picture that comes again is seen once."""
        first, index = distinct(pixel_values, adapters)
        if len(first) == len(index) or (adapters is None and rows_are_named(self.model)):
            first = index = list(range(len(index)))
        with use_adapters(self.model, adapters and [adapters[row] for row in first]):
            return self.encode_images(pixel_values[first])[index] if first != index else self.encode_images(pixel_values)

    def room(self, prompt: str) -> int:
        """Tokens for a text after a prompt, beside the first and the last one."""
        return self.room_after(len(plain_ids(self.tokenizer, prompt)))

    def room_after(self, tokens: int) -> int:
        """`room`, for a prompt of so many tokens."""
        return self.max_tokens - tokens - 2

    def generation_groups(self, starts: list[list[int]]) -> Iterable[list[int]]:
        """Which starts are continued in one batch: of one length, so that no padding stands before what follows."""
        return by_length(starts)

    def generate_ids(self, seen: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Tensor:
        """The ids that follow `ids` (rows, tokens) over `seen` (rows, states, width)."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40, **settings: Any
    ) -> list[str]:
        """One text a row of pictures, after its prompt; the prompt is not in it. `adapters` names each row's own.

        A text ends after `max_new_tokens`, or where the model's positions do.
        """
        return self.generate_from_features(
            self.encode_unique_images(pixel_values, adapters), prompts, adapters, max_new_tokens, **settings
        )

    @torch.no_grad()
    def generate_from_features(
        self, seen: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40, **settings: Any
    ) -> list[str]:
        """`generate` over what was seen of each row (rows, states, width). A text without its end is a CutText."""
        starts, said = [self.prompt_ids(prompt) for prompt in prompts], [""] * len(prompts)
        for group in self.generation_groups(starts):
            some, device = [starts[index] for index in group], seen.device
            ids, mask = pad(some, self.pad_id).to(device), mask_of(some).to(device)
            most = min(max_new_tokens, *(self.room(prompts[index]) + 1 for index in group))
            if most < 1:
                raise ConfigError(f"a prompt has too many tokens for this model: {max((prompts[i] for i in group), key=len)!r}")
            mine = adapters and [adapters[index] for index in group]
            with use_adapters(self.model, mine, settings.get("num_beams", 1)):
                made = self.generate_ids(seen[group], ids, mask, settings | {"max_new_tokens": most})
            for index, text, ids in zip(group, self.texts_of(made), made.tolist(), strict=True):
                text = " ".join(text.split())
                said[index] = text if self.end_id in ids else CutText(text)
        return said

    def texts_of(self, ids: Tensor) -> list[str]:
        """Decode ids (rows, tokens) without the structural and unknown tokens; tokens that a user added stay."""
        kept = [[id for id in row if id not in self.hidden_ids] for row in ids.tolist()]
        return self.tokenizer.batch_decode(kept, skip_special_tokens=False)

    @cached_property
    def structural_ids(self) -> set[Any]:
        """Return the ids that no text may contain."""
        ids: set[Any] = {getattr(self, "start_id", None), *getattr(self, "image_ids", [])[:1]}
        return special_ids(self.tokenizer) | (ids - {None})

    @cached_property
    def hidden_ids(self) -> set[Any]:
        return self.structural_ids | {self.tokenizer.unk_token_id}


def rows_are_named(model: nn.Module) -> bool:
    """Whether a `lora_blip.use_adapters` around this one names an adapter for every row, so that no row may be left out."""
    return any(isinstance(module, AdapterStack) and module.routing.active.count for module in model.modules())


class DecoderLanguage(Language):
    """What BLIP and OPT share: one row holds a start that is silent, the text and the end, and predicts its next token."""

    def tokenize(self, prompts: list[str], texts: list[str], image: list[int] | None = None) -> Rows:
        starts, about = [self.prompt_ids(prompt) for prompt in prompts], image or range(len(texts))
        ids = [[*starts[i], *self.text_ids(prompts[i], text), self.end_id] for i, text in zip(about, texts, strict=True)]
        targets = shifted_targets(ids, [len(starts[i]) for i in about])
        return Rows(pad(ids, self.pad_id), mask_of(ids), targets, image=index_of(image))

    def text_ids(self, prompt: str, text: str) -> list[int]:
        """A byte-level BPE tells a word after a space from one at the start; word pieces do not."""
        return plain_ids(self.tokenizer, f" {text}" if prompt else text)


class EncoderLanguage(Language):
    """What BLIP's questions and T5 share: an encoder reads the prompt, a decoder writes the text from `first` to the end."""

    def tokenize(self, prompts: list[str], texts: list[str], image: list[int] | None = None) -> Rows:
        read = [self.prompt_ids(prompt) for prompt in prompts]
        written = [[*plain_ids(self.tokenizer, text), self.end_id] for text in texts]
        decoder = pad([[self.start_id, *row[:-1]] for row in written], self.pad_id)
        return Rows(pad(read, self.pad_id), mask_of(read), pad(written, IGNORE), decoder, index_of(image))

    def room_after(self, tokens: int) -> int:
        asked = super().room_after(tokens)
        return self.max_tokens - 2 if asked >= 0 else asked  # prompt and text have positions of their own

    def generation_groups(self, starts: list[list[int]]) -> Iterable[list[int]]:
        return [list(range(len(starts)))]  # an encoder masks the padding of short ones

"""Each kind of language model: how it makes rows of a prompt and a text, is run over what was seen, and writes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs

from lora_blip import lora
from lora_blip.attention.text import reading
from lora_blip.config import ConfigError
from lora_blip.models import Backbone, ModelError
from lora_blip.tasks.losses import IGNORE
from lora_blip.tasks.packing import Packed, apart, pack
from lora_blip.tasks.pictures import distinct
from lora_blip.tasks.rows import Rows, by_length, index_of, mask_of, pad, plain_ids, shifted_targets

Adapters = list[str | None] | None  # the adapter of each row, None for the base; no list: all that are on
Named = dict[str, Any]  # arguments by name


class Language:
    """How one kind of language model reads a prompt and a text, is run, and generates.

    `see` runs the vision side once an image, `logits` runs the texts over what was seen: together they
    are the model's whole forward, and an image with five texts is looked at once.
    """

    model: Any
    tokenizer: Any
    pad_id: int
    first: int  # the token that a decoder starts from
    end: int  # the token that ends every text
    longest: int  # tokens of a row, the image left out

    def start(self, prompt: str) -> list[int]:
        """What the model has read before the first token of its text."""
        raise NotImplementedError

    def rows(self, prompts: list[str], texts: list[str], image: list[int] | None = None) -> Rows:
        """A row a text. `prompts` has one for each image, `image` says which one each text is about: i, without it."""
        raise NotImplementedError

    def see(self, pixel_values: Tensor) -> Tensor:
        """(images, 3, H, W) → what the language side reads of each image (images, states, width)."""
        raise NotImplementedError

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        """Logits (rows, tokens, vocabulary) of rows over `seen` (images, states, width)."""
        raise NotImplementedError

    def after(self, states: Tensor) -> Tensor:
        """`see`, from the ViT's output (images, states, width) on."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Linear:
        """What turns the states of the text into logits."""
        raise NotImplementedError

    def packed(self, rows: Rows, prompt: list[int], picture: list[int]) -> Packed:
        """The rows as they are learned fastest; row i is about prompt `prompt[i]` and picture `picture[i]`."""
        raise NotImplementedError

    def label_states(self, seen: Tensor, each: Callable[[Tensor], Tensor], rows: Rows, packed: Packed) -> Tensor:
        """What `head` reads for each label, (labels, width), over what was seen of each picture.

        `each` gives every prompt what belongs to its picture.
        """
        raise NotImplementedError

    def logits_of_one(self, seen: Tensor, rows: Rows) -> Tensor:
        """`logits` of rows that are all about one image, `seen` (1, states, width)."""
        return self.logits(seen, rows)

    def look(self, pixel_values: Tensor, adapters: Adapters = None) -> Tensor:
        """(rows, 3, H, W) → what `see` makes of each row (rows, states, width); a picture that comes again is seen once."""
        first, index = distinct(pixel_values, adapters)
        if len(first) == len(index) or (adapters is None and rows_are_named(self.model)):
            first = index = list(range(len(index)))
        with lora.chosen(self.model, adapters and [adapters[row] for row in first]):
            return self.see(pixel_values[first])[index] if first != index else self.see(pixel_values)

    def room(self, prompt: str) -> int:
        """Tokens for a text after a prompt, beside the first and the last one."""
        return self.room_after(len(plain_ids(self.tokenizer, prompt)))

    def room_after(self, tokens: int) -> int:
        """`room`, for a prompt of so many tokens."""
        return self.longest - tokens - 2

    def together(self, starts: list[list[int]]) -> Iterable[list[int]]:
        """Which starts are continued in one batch: of one length, so that no padding stands before what follows."""
        return by_length(starts)

    def continued(self, seen: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Tensor:
        """The ids that follow `ids` (rows, tokens) over `seen` (rows, states, width)."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40, **settings: Any
    ) -> list[str]:
        """One text a row of pictures, after its prompt; the prompt is not in it. `adapters` names each row's own.

        A text ends after `max_new_tokens`, or where the model's positions do.
        """
        return self.write(self.look(pixel_values, adapters), prompts, adapters, max_new_tokens, **settings)

    @torch.no_grad()
    def write(
        self, seen: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40, **settings: Any
    ) -> list[str]:
        """`generate` over what was seen of each row (rows, states, width)."""
        starts, said = [self.start(prompt) for prompt in prompts], [""] * len(prompts)
        for group in self.together(starts):
            some, device = [starts[index] for index in group], seen.device
            ids, mask = pad(some, self.pad_id).to(device), mask_of(some).to(device)
            most = min(max_new_tokens, *(self.room(prompts[index]) + 1 for index in group))
            if most < 1:
                raise ConfigError(f"a prompt has too many tokens for this model: {max((prompts[i] for i in group), key=len)!r}")
            mine = adapters and [adapters[index] for index in group]
            with lora.chosen(self.model, mine, settings.get("num_beams", 1)):
                made = self.continued(seen[group], ids, mask, settings | {"max_new_tokens": most})
            for index, text in zip(group, self.tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                said[index] = " ".join(text.split())
        return said


def cast_once(states: Tensor) -> Tensor:
    """In autocast's dtype, where it is on: each layer's keys and values would cast them again."""
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


def rows_are_named(model: nn.Module) -> bool:
    """Whether a `lora.chosen` around this one names an adapter for every row, so that no row may be left out."""
    return any(isinstance(module, lora.Updates) and module.choice.acting.count for module in model.modules())


class DecoderLanguage(Language):
    """What BLIP and OPT share: one row holds a start that is silent, the text and the end, and predicts its next token."""

    def rows(self, prompts: list[str], texts: list[str], image: list[int] | None = None) -> Rows:
        starts, about = [self.start(prompt) for prompt in prompts], image or range(len(texts))
        ids = [[*starts[i], *self.text_ids(prompts[i], text), self.end] for i, text in zip(about, texts, strict=True)]
        targets = shifted_targets(ids, [len(starts[i]) for i in about])
        return Rows(pad(ids, self.pad_id), mask_of(ids), targets, image=index_of(image))

    def text_ids(self, prompt: str, text: str) -> list[int]:
        """A byte-level BPE tells a word after a space from one at the start; word pieces do not."""
        return plain_ids(self.tokenizer, f" {text}" if prompt else text)


class EncoderLanguage(Language):
    """What BLIP's questions and T5 share: an encoder reads the prompt, a decoder writes the text from `first` to the end."""

    def rows(self, prompts: list[str], texts: list[str], image: list[int] | None = None) -> Rows:
        read = [self.start(prompt) for prompt in prompts]
        written = [[*plain_ids(self.tokenizer, text), self.end] for text in texts]
        decoder = pad([[self.first, *row[:-1]] for row in written], self.pad_id)
        return Rows(pad(read, self.pad_id), mask_of(read), pad(written, IGNORE), decoder, index_of(image))

    def room_after(self, tokens: int) -> int:
        asked = super().room_after(tokens)
        return self.longest - 2 if asked >= 0 else asked  # prompt and text have positions of their own

    def together(self, starts: list[list[int]]) -> Iterable[list[int]]:
        return [list(range(len(starts)))]  # an encoder masks the padding of short ones


class BlipLanguage(DecoderLanguage):
    """BLIP's text decoder: [DEC] prompt text [SEP]."""

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        text = backbone.model.config.text_config
        self.first, self.end, self.pad_id = text.bos_token_id, text.sep_token_id, text.pad_token_id
        self.longest = text.max_position_embeddings

    def start(self, prompt: str) -> list[int]:
        return [self.first, *plain_ids(self.tokenizer, prompt)]

    def see(self, pixel_values: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixel_values).last_hidden_state

    def after(self, states: Tensor) -> Tensor:
        return states

    @property
    def head(self) -> nn.Linear:
        return self.model.text_decoder.cls.predictions.decoder

    def packed(self, rows: Rows, prompt: list[int], picture: list[int]) -> Packed:  # noqa: ARG002
        return pack(rows.input_ids, rows, picture)

    def label_states(self, seen: Tensor, each: Callable[[Tensor], Tensor], rows: Rows, packed: Packed) -> Tensor:  # noqa: ARG002
        return self.decoded_packed(packed, encoder_hidden_states=cast_once(seen))

    def decoded_packed(self, packed: Packed, **source: Tensor) -> Tensor:
        decoder = self.model.text_decoder
        states = decoder.bert(
            input_ids=packed.ids, position_ids=packed.positions, attention_mask=packed.mask(decoder.dtype), is_decoder=True,
            use_cache=False, **source,
        ).last_hidden_state  # fmt: skip
        return decoder.cls.predictions.transform(states.flatten(0, 1)[packed.places])

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        return self.decoded(rows, encoder_hidden_states=rows.each(seen))

    def logits_of_one(self, seen: Tensor, rows: Rows) -> Tensor:
        with reading(self.model.text_decoder, seen, rows=len(rows.input_ids)) as source:
            return self.decoded(rows, **source)

    def decoded(self, rows: Rows, **source: Tensor) -> Tensor:
        return self.model.text_decoder(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False, **source
        ).logits  # fmt: skip

    def continued(self, seen: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Tensor:
        with reading(self.model.text_decoder, seen) as source:
            made = self.model.text_decoder.generate(
                input_ids=ids, attention_mask=mask, eos_token_id=self.end, pad_token_id=self.pad_id, **source, **settings
            )
        return made[:, ids.shape[1] :]


class BlipVqaLanguage(EncoderLanguage, BlipLanguage):
    """BLIP for questions: an encoder reads [CLS] question [SEP] over the image, a decoder answers [DEC] answer [SEP].

    transformers feeds its labels to the decoder unshifted, and lets it attend to the padding of ragged
    questions; here the decoder's input and the targets are apart, and `mend` sees to the other.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        mend(self.model.text_decoder)

    def start(self, prompt: str) -> list[int]:
        return [self.tokenizer.cls_token_id, *plain_ids(self.tokenizer, prompt), self.tokenizer.sep_token_id]

    def read(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The question, read over the image: (images, tokens, width)."""
        return self.model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state

    def packed(self, rows: Rows, prompt: list[int], picture: list[int]) -> Packed:  # noqa: ARG002
        assert rows.decoder_input_ids is not None
        return pack(rows.decoder_input_ids, rows, prompt)  # the answers to one question

    def label_states(self, seen: Tensor, each: Callable[[Tensor], Tensor], rows: Rows, packed: Packed) -> Tensor:
        read = self.read(each(cast_once(seen)), rows.input_ids, rows.attention_mask)
        return self.decoded_packed(packed, encoder_hidden_states=read, encoder_attention_mask=rows.attention_mask)

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        read, mask = self.read(seen, rows.input_ids, rows.attention_mask), rows.attention_mask
        return self.decoded(rows, encoder_hidden_states=rows.each(read), encoder_attention_mask=rows.each(mask))

    def logits_of_one(self, seen: Tensor, rows: Rows) -> Tensor:
        read = self.read(seen, rows.input_ids, rows.attention_mask)
        with reading(self.model.text_decoder, read, rows.attention_mask, len(rows.targets)) as source:
            return self.decoded(rows, **source)

    def decoded(self, rows: Rows, **source: Tensor) -> Tensor:
        # an answer's padding stands behind it, where a causal decoder never looks
        return self.model.text_decoder(input_ids=rows.decoder_input_ids, use_cache=False, **source).logits

    def continued(self, seen: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Tensor:
        with reading(self.model.text_decoder, self.read(seen, ids, mask), mask) as source:
            made = self.model.text_decoder.generate(
                input_ids=torch.full((len(ids), 1), self.first, device=ids.device),
                eos_token_id=self.end, pad_token_id=self.pad_id, **source, **settings,
            )  # fmt: skip
        return made[:, 1:]


def mend(decoder: Any) -> None:
    """Let the cross-attention of a BLIP text decoder heed the mask of what it reads. Repeating a call changes nothing."""
    for layer in decoder.bert.encoder.layer:
        attention = layer.crossattention.self
        if hand_over_mask not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(hand_over_mask, with_kwargs=True)


def hand_over_mask(_attention: nn.Module, args: tuple[Any, ...], given: Named) -> tuple[tuple[Any, ...], Named]:
    """BLIP's cross-attention gets the mask of what it reads as `attention_mask`, and looks for it under another name."""
    if given.get("encoder_attention_mask") is None:
        given = given | {"encoder_attention_mask": given.get("attention_mask")}
    return args, given


class Blip2Language(Language):
    """What BLIP-2's two kinds of language model share: the image stands first, as placeholders."""

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        config, language = backbone.model.config, backbone.model.language_model
        self.image = [config.image_token_index] * config.num_query_tokens
        self.pad_id = config.text_config.pad_token_id
        end = language.generation_config.eos_token_id or config.text_config.eos_token_id
        self.end = end[0] if isinstance(end, list) else end
        self.longest = getattr(config.text_config, "max_position_embeddings", 512) - len(self.image)
        if config.image_token_index >= backbone.model.get_input_embeddings().num_embeddings:
            raise ModelError(f"{backbone.name!r}: image_token_index {config.image_token_index} is past the embeddings")

    def see(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output

    def after(self, states: Tensor) -> Tensor:
        model = self.model
        there = torch.ones(states.shape[:-1], dtype=torch.long, device=states.device)
        queries = model.qformer(
            query_embeds=model.query_tokens.expand(len(states), -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=there,
        ).last_hidden_state
        return model.language_projection(queries.to(states.dtype))

    @property
    def head(self) -> nn.Linear:
        return self.model.language_model.get_output_embeddings()

    def packed(self, rows: Rows, prompt: list[int], picture: list[int]) -> Packed:  # noqa: ARG002
        return apart(rows)

    def run(self, seen: Tensor, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
        """The model's forward with `seen` (rows, queries, width) in the place of the image."""
        image = BaseModelOutputWithVisionQformerOutputs(pooler_output=seen)
        return self.model(
            pixel_values=None, mm_encoder_outputs={"image": image}, input_ids=ids, attention_mask=mask, use_cache=False, **more
        ).logits

    def embedded(self, seen: Tensor, ids: Tensor) -> Tensor:
        """What the language model reads: `ids` (rows, tokens) as embeddings, `seen` in the place of the image's."""
        embeds = self.model.get_input_embeddings()(ids)
        return embeds.masked_scatter((ids == self.image[0])[..., None], seen.to(embeds.device, embeds.dtype))

    def continued(self, seen: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Tensor:
        made = self.model.language_model.generate(
            inputs_embeds=self.embedded(seen, ids), attention_mask=mask, eos_token_id=self.end, pad_token_id=self.pad_id,
            **settings,
        )  # fmt: skip
        echoed = made.shape[1] >= ids.shape[1] and bool((made[:1, : ids.shape[1]] == ids[:1]).all())
        return made[:, ids.shape[1] :] if echoed else made


class OptLanguage(DecoderLanguage, Blip2Language):
    """BLIP-2 with a decoder (OPT): <image>… </s> prompt text end."""

    def start(self, prompt: str) -> list[int]:
        return [*self.image, self.model.config.text_config.bos_token_id, *plain_ids(self.tokenizer, prompt)]

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        return self.run(rows.each(seen), rows.input_ids, rows.attention_mask)

    def label_states(self, seen: Tensor, each: Callable[[Tensor], Tensor], rows: Rows, packed: Packed) -> Tensor:
        embeds = self.embedded(rows.each(each(seen)), rows.input_ids)
        decoder = self.model.language_model.model
        states = decoder(inputs_embeds=embeds, attention_mask=rows.attention_mask, use_cache=False).last_hidden_state
        return states.flatten(0, 1)[packed.places]

    def continued(self, seen: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Tensor:
        return super().continued(seen, ids, mask, settings | {"input_ids": ids})


class T5Language(EncoderLanguage, Blip2Language):
    """BLIP-2 with an encoder-decoder (Flan-T5): it reads <image>… prompt </s> and writes text </s>."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        first = getattr(backbone.model.config.text_config, "decoder_start_token_id", None)
        self.first = self.pad_id if first is None else first  # T5 starts from its padding

    def start(self, prompt: str) -> list[int]:
        return [*self.image, *plain_ids(self.tokenizer, prompt), self.end]

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        model, mask = self.model.language_model, rows.attention_mask
        read = model.get_encoder()(inputs_embeds=self.embedded(seen, rows.input_ids), attention_mask=mask).last_hidden_state
        return model(
            encoder_outputs=BaseModelOutput(last_hidden_state=rows.each(read)), attention_mask=rows.each(mask),
            decoder_input_ids=rows.decoder_input_ids, use_cache=False,
        ).logits  # fmt: skip

    def label_states(self, seen: Tensor, each: Callable[[Tensor], Tensor], rows: Rows, packed: Packed) -> Tensor:
        model, mask = self.model.language_model, rows.attention_mask
        embeds = self.embedded(each(seen), rows.input_ids)
        read = model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        states = model.get_decoder()(
            input_ids=rows.decoder_input_ids, encoder_hidden_states=rows.each(read), encoder_attention_mask=rows.each(mask),
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)[packed.places]  # fmt: skip
        return states * model.model_dim**-0.5 if model.config.scale_decoder_outputs else states

    def continued(self, seen: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Tensor:
        return super().continued(seen, ids, mask, settings | {"decoder_start_token_id": self.first})


def language_of(backbone: Backbone) -> Language:
    if backbone.architecture == "BlipForQuestionAnswering":
        return BlipVqaLanguage(backbone)
    if backbone.family == "blip":
        return BlipLanguage(backbone)
    return OptLanguage(backbone) if backbone.model.config.use_decoder_only_language_model else T5Language(backbone)

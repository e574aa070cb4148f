"""The language side of BLIP: a text decoder that attends to the image. For questions, a text encoder comes before it."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_blip.kernels.linear import as_autocast
from lora_blip.kernels.text_attention import reading
from lora_blip.models.attention_masks import bidirectional_mask
from lora_blip.models.generated_ids import new_tokens
from lora_blip.models.language import DecoderLanguage, EncoderLanguage, Named
from lora_blip.models.library import call
from lora_blip.models.loading import Backbone
from lora_blip.models.packing import EncoderRows, PackedRows, as_tensors, encoder_rows, rows_of
from lora_blip.models.token_rows import PaddedRows, TokenRows, plain_ids, take_rows


class BlipLanguage(DecoderLanguage[PackedRows]):
    """BLIP's text decoder: [DEC] prompt text [SEP]."""

    reads_encoder_ids = True  # it has no encoder, but transformers applies these options to the prompt's ids

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        text = backbone.model.config.text_config
        self.start_id, self.end_id, self.pad_id = text.bos_token_id, text.sep_token_id, text.pad_token_id
        self.max_tokens = text.max_position_embeddings

    @property
    def generator(self) -> Any:
        return self.model.text_decoder

    def prompt_ids(self, prompt: str) -> list[int]:
        return [self.start_id, *plain_ids(self.tokenizer, prompt)]

    def project_vision(self, states: Tensor) -> Tensor:
        return states

    @property
    def head(self) -> nn.Linear:
        return self.model.text_decoder.cls.predictions.decoder

    def arrange(self, tokens: TokenRows, image: Sequence[int], packs: bool = True) -> PackedRows:  # noqa: ARG002
        return self.packed(tokens, [image[example] for example in tokens.example])  # the texts of an image are in one row

    def packed(self, tokens: TokenRows, source: list[int], encoder: EncoderRows | None = None) -> PackedRows:
        """Return one row for each source: the states of an image take longer than long rows of text."""
        return as_tensors(rows_of(tokens, source, longest=sys.maxsize, share=False), tokens, encoder)

    def label_states(self, features: Tensor, rows: PackedRows, image: Tensor | None) -> Tensor:  # noqa: ARG002
        return self.packed_states(rows, encoder_hidden_states=as_autocast(features))  # cast once, not in each layer

    def packed_states(self, rows: PackedRows, **source: Tensor | None) -> Tensor:
        """Return the input of the head for each label, (labels, width). source: the states for the cross-attention."""
        decoder = self.model.text_decoder
        states = call(
            decoder.bert, input_ids=rows.ids, position_ids=rows.positions, attention_mask=rows.mask(decoder.dtype),
            is_decoder=True, use_cache=False, **source,
        ).last_hidden_state  # fmt: skip
        return decoder.cls.predictions.transform(states.flatten(0, 1)[rows.labels.positions])

    def logits(self, features: Tensor, rows: PaddedRows) -> Tensor:
        return self.decoder_logits(rows, encoder_hidden_states=rows.per_text(features))

    def logits_of_one_image(self, features: Tensor, rows: PaddedRows) -> Tensor:
        with reading(self.model.text_decoder, features, rows=len(rows.input_ids)) as source:
            return self.decoder_logits(rows, **source)

    def decoder_logits(self, rows: PaddedRows, **source: Tensor) -> Tensor:
        decoder = self.model.text_decoder
        return call(
            decoder, input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False, **source
        ).logits  # fmt: skip

    def generate_ids(self, features: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Any:
        with reading(self.model.text_decoder, features) as source:
            output = self.model.text_decoder.generate(
                input_ids=ids, attention_mask=mask, eos_token_id=self.end_id, pad_token_id=self.pad_id, **source, **settings
            )
        return new_tokens(output, ids.shape[1])


class BlipVqaLanguage(EncoderLanguage[PackedRows], BlipLanguage):
    """BLIP for questions: an encoder reads [CLS] question [SEP] over the image, a decoder generates [DEC] answer [SEP].

    The forward of transformers does not shift the labels, and its decoder attends to the padding of shorter questions. Here the
    decoder's input and the targets are separate, and `repair_cross_attention` masks the padding.
    """

    pads_left = reads_encoder_ids = False

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        repair_cross_attention(self.model.text_decoder)

    def prompt_ids(self, prompt: str) -> list[int]:
        return [self.tokenizer.cls_token_id, *plain_ids(self.tokenizer, prompt), self.tokenizer.sep_token_id]

    def encode_questions(self, features: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return the encoder's states of each question over its image, (examples, tokens, width). mask: None hides nothing."""
        encoder = self.model.text_encoder
        return call(encoder, input_ids=ids, attention_mask=mask, encoder_hidden_states=features).last_hidden_state

    def arrange(self, tokens: TokenRows, image: Sequence[int], packs: bool = True) -> PackedRows:  # noqa: ARG002
        questions = encoder_rows(tokens.inputs, tokens.pad_id, image)
        return self.packed(tokens, tokens.example, questions)  # the answers to one question are in one row

    def label_states(self, features: Tensor, rows: PackedRows, image: Tensor | None) -> Tensor:  # noqa: ARG002
        questions, encoder = rows.encoder, self.model.text_encoder
        assert questions is not None
        own, read = (
            bidirectional_mask(encoder.config, questions.mask, questions.is_full, ids.shape[1], encoder.dtype)
            for ids in (questions.ids, rows.ids)
        )
        states = self.encode_questions(take_rows(as_autocast(features), questions.image), questions.ids, own)
        return self.packed_states(rows, encoder_hidden_states=states, encoder_attention_mask=read)

    def logits(self, features: Tensor, rows: PaddedRows) -> Tensor:
        states = self.encode_questions(features, rows.input_ids, rows.attention_mask)
        mask = rows.per_text(rows.attention_mask)
        return self.decoder_logits(rows, encoder_hidden_states=rows.per_text(states), encoder_attention_mask=mask)

    def logits_of_one_image(self, features: Tensor, rows: PaddedRows) -> Tensor:
        states = self.encode_questions(features, rows.input_ids, rows.attention_mask)
        with reading(self.model.text_decoder, states, rows.attention_mask, len(rows.targets)) as source:
            return self.decoder_logits(rows, **source)

    def decoder_logits(self, rows: PaddedRows, **source: Tensor) -> Tensor:
        # No mask: the padding comes after the answer, and a causal decoder never attends to it.
        return call(self.model.text_decoder, input_ids=rows.decoder_input_ids, use_cache=False, **source).logits

    def generate_ids(self, features: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Any:
        with reading(self.model.text_decoder, self.encode_questions(features, ids, mask), mask) as source:
            output = self.model.text_decoder.generate(
                input_ids=torch.full((len(ids), 1), self.start_id, device=ids.device),
                eos_token_id=self.end_id, pad_token_id=self.pad_id, **source, **settings,
            )  # fmt: skip
        return new_tokens(output, 1)


def repair_cross_attention(decoder: Any) -> None:
    """Make the cross-attention of a BLIP text decoder use the encoder's mask. Repeating a call changes nothing."""
    for layer in decoder.bert.encoder.layer:
        attention = layer.crossattention.self
        if pass_encoder_mask not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(pass_encoder_mask, with_kwargs=True)


def pass_encoder_mask(_attention: nn.Module, args: tuple[Any, ...], kwargs: Named) -> tuple[tuple[Any, ...], Named]:
    """Pass the encoder's mask as `encoder_attention_mask`, the name that BLIP's cross-attention uses (a pre-hook).

    transformers passes it as `attention_mask`.
    """
    if kwargs.get("encoder_attention_mask") is None:
        kwargs = kwargs | {"encoder_attention_mask": kwargs.get("attention_mask")}
    return args, kwargs

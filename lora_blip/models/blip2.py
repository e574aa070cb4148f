"""BLIP-2's language side: the Q-Former's states replace placeholder tokens before the text of an OPT or a Flan-T5."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs

from lora_blip.models.attention_masks import ATTENTIONS, bidirectional_mask, causal_arguments, scores_mask
from lora_blip.models.generated_ids import new_tokens
from lora_blip.models.language import DecoderLanguage, EncoderLanguage, Language, Named
from lora_blip.models.library import call
from lora_blip.models.loading import Backbone
from lora_blip.models.packing import PackedRows, TextRows, as_tensors, encoder_rows, rows_of, saves_tokens
from lora_blip.models.token_rows import PaddedRows, TokenRows, plain_ids, take_rows


class Blip2Language(Language[TextRows]):
    """The base of BLIP-2's two kinds of language model. Its input begins with placeholders for the image."""

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        config, language = backbone.model.config, backbone.model.language_model
        self.image_ids = [config.image_token_index] * config.num_query_tokens
        self.pad_id = config.text_config.pad_token_id
        end = language.generation_config.eos_token_id or config.text_config.eos_token_id
        self.end_id = end[0] if isinstance(end, list) else end
        self.max_tokens = getattr(config.text_config, "max_position_embeddings", 512) - len(self.image_ids)

    @property
    def generator(self) -> Any:
        return self.model.language_model

    def project_vision(self, states: Tensor) -> Tensor:
        model = self.model
        queries = call(
            model.qformer, query_embeds=model.query_tokens.expand(len(states), -1, -1), encoder_hidden_states=states
        ).last_hidden_state  # without a mask: transformers would read it, and drop it because it hides nothing
        return model.language_projection(queries.to(states.dtype))

    @property
    def head(self) -> nn.Linear:
        return self.model.language_model.get_output_embeddings()

    def arrange(self, tokens: TokenRows, image: Sequence[int], packs: bool = True) -> TextRows:
        """Pack the texts if that saves tokens, and if the attention accepts a mask of 4 dimensions. Otherwise pad them."""
        packs = packs and self.generator.config._attn_implementation in ATTENTIONS
        packed = self.pack(tokens, image) if packs else None
        return tokens.pad(with_labels=True) if packed is None else packed

    @abstractmethod
    def pack(self, tokens: TokenRows, image: Sequence[int]) -> PackedRows | None:
        """Return packed rows for `label_states`. None: they do not save tokens. image: the image of each example."""

    def embed(self, features: Tensor, ids: Tensor) -> Tensor:
        """Return the embeddings of `ids` (rows, tokens), with `features` in place of the image's placeholders."""
        embeds = self.model.get_input_embeddings()(ids)
        return embeds.masked_scatter((ids == self.image_ids[0])[..., None], features.to(embeds.device, embeds.dtype))

    def generate_ids(self, features: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Any:
        output = self.model.language_model.generate(
            inputs_embeds=self.embed(features, ids), attention_mask=mask, eos_token_id=self.end_id, pad_token_id=self.pad_id,
            **settings,
        )  # fmt: skip
        first = output[:1] if isinstance(output, Tensor) else output.sequences[:1]
        with_prompt = first.shape[1] >= ids.shape[1] and bool((first[:, : ids.shape[1]] == ids[:1]).all())
        return new_tokens(output, ids.shape[1] if with_prompt else 0)


class OptLanguage(DecoderLanguage[TextRows], Blip2Language):
    """BLIP-2 with a decoder (OPT): <image>… </s> prompt text end."""

    def prompt_ids(self, prompt: str) -> list[int]:
        return [*self.image_ids, self.model.config.text_config.bos_token_id, *plain_ids(self.tokenizer, prompt)]

    def logits(self, features: Tensor, rows: PaddedRows) -> Tensor:
        image = BaseModelOutputWithVisionQformerOutputs(pooler_output=rows.per_text(features))
        return call(
            self.model, pixel_values=None, mm_encoder_outputs={"image": image}, input_ids=rows.input_ids,
            attention_mask=rows.attention_mask, use_cache=False,
        ).logits  # fmt: skip

    def pack(self, tokens: TokenRows, image: Sequence[int]) -> PackedRows | None:
        rows = rows_of(tokens, [image[example] for example in tokens.example])
        return as_tensors(rows, tokens) if saves_tokens(rows, tokens) else None

    def label_states(self, features: Tensor, rows: TextRows, image: Tensor | None) -> Tensor:
        decoder = self.model.language_model.model
        if isinstance(rows, PackedRows):
            embeds = self.embed(take_rows(features, rows.source), rows.ids)
            mask = scores_mask(decoder.config, rows.visible(), embeds.dtype)
            named: Named = {"attention_mask": mask, "position_ids": rows.positions}
        else:
            embeds = self.embed(rows.per_text(take_rows(features, image)), rows.input_ids)
            named = causal_arguments(decoder.config, rows.attention_mask, rows.is_full, embeds.dtype)
        states = call(decoder, inputs_embeds=embeds, use_cache=False, **named).last_hidden_state
        return states.flatten(0, 1)[label_positions(rows)]

    def generate_ids(self, features: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Any:
        return super().generate_ids(features, ids, mask, settings | {"input_ids": ids})


class T5Language(EncoderLanguage[TextRows], Blip2Language):
    """BLIP-2 with an encoder-decoder (Flan-T5): the encoder reads <image>… prompt </s>, the decoder generates text </s>."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        first = getattr(backbone.model.config.text_config, "decoder_start_token_id", None)
        self.start_id = self.pad_id if first is None else first  # T5 starts from its padding token

    def prompt_ids(self, prompt: str) -> list[int]:
        return [*self.image_ids, *plain_ids(self.tokenizer, prompt), self.end_id]

    def pack(self, tokens: TokenRows, image: Sequence[int]) -> PackedRows | None:
        """Return one row of the encoder for each prompt of an image, and the rows of the decoder."""
        numbers: dict[tuple[int, tuple[int, ...]], int] = {}  # (image, prompt) → the row of the encoder
        example_row = [
            numbers.setdefault((number, tuple(ids)), len(numbers)) for number, ids in zip(image, tokens.inputs, strict=True)
        ]
        if len(numbers) == len(tokens.targets):
            return None  # one text for each row of the encoder
        source = [example_row[example] for example in tokens.example]
        rows = rows_of(tokens, source)
        if not saves_tokens(rows, tokens):
            rows = rows_of(tokens, source, longest=0)  # one row of the decoder for each text
        images, prompts = zip(*numbers, strict=True)
        return as_tensors(rows, tokens, encoder_rows([*map(list, prompts)], tokens.pad_id, images))

    def encode_prompts(self, features: Tensor, ids: Tensor, mask: Tensor, is_full: bool) -> Tensor:
        """Return the encoder's states of images and prompts, (rows, tokens, width)."""
        embeds, encoder = self.embed(features, ids), self.model.language_model.get_encoder()
        mask_of_scores = bidirectional_mask(encoder.config, mask, is_full, embeds.shape[1], embeds.dtype)
        states: Tensor = call(encoder, inputs_embeds=embeds, attention_mask=mask_of_scores).last_hidden_state
        return states

    def logits(self, features: Tensor, rows: PaddedRows) -> Tensor:
        states = rows.per_text(self.encode_prompts(features, rows.input_ids, rows.attention_mask, rows.is_full))
        return call(
            self.model.language_model, encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=rows.per_text(rows.attention_mask), decoder_input_ids=rows.decoder_input_ids, use_cache=False,
        ).logits  # fmt: skip

    def label_states(self, features: Tensor, rows: TextRows, image: Tensor | None) -> Tensor:
        model = self.model.language_model
        decoder = model.get_decoder()
        named: Named = {}  # not Named(), which torch.compile cannot trace
        if isinstance(rows, PackedRows):
            prompts, ids = rows.encoder, rows.ids
            assert prompts is not None  # as in all packed rows of an encoder-decoder
            own, is_full, index = prompts.mask, prompts.is_full, rows.source
            states = self.encode_prompts(take_rows(features, prompts.image), prompts.ids, own, is_full)
            named = {"attention_mask": scores_mask(decoder.config, rows.visible(), states.dtype)}
        else:
            assert rows.decoder_input_ids is not None  # as in all rows of an encoder-decoder
            ids, own, is_full, index = rows.decoder_input_ids, rows.attention_mask, rows.is_full, rows.example
            states = self.encode_prompts(take_rows(features, image), rows.input_ids, own, is_full)
        states, own = take_rows(states, index), take_rows(own, index)
        mask = bidirectional_mask(decoder.config, own, is_full, ids.shape[1], states.dtype)
        states = call(
            decoder, input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False, **named
        ).last_hidden_state.flatten(0, 1)[label_positions(rows)]  # fmt: skip
        return states * model.model_dim**-0.5 if model.config.scale_decoder_outputs else states

    def generate_ids(self, features: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Any:
        return super().generate_ids(features, ids, mask, settings | {"decoder_start_token_id": self.start_id})


def label_positions(rows: TextRows) -> Tensor:
    """Return the positions (labels,) of the labels in the flattened rows (texts · tokens,)."""
    assert rows.labels is not None  # as in all rows of `arrange`
    return rows.labels.positions

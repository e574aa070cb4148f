"""Image-text models of BLIP and BLIP-2: a joint space for the contrast (ITC), and a head for image and text together (ITM).

The forward of transformers computes one head for one pair. Here each part is called separately, so each image and each text is
encoded once. Padding is always masked.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lora_blip.models.attention_masks import bidirectional_mask
from lora_blip.models.library import call
from lora_blip.models.loading import Backbone
from lora_blip.models.token_rows import mask_of, pad, plain_ids

BLOCK = 64  # images in one matrix product with all texts, because each image has views × texts cosines


@dataclass(frozen=True)
class TokenizedTexts:
    """Token rows [CLS] text [SEP]."""

    ids: Tensor  # (texts, tokens)
    mask: Tensor  # (texts, tokens)
    is_full: bool = False  # True: the mask hides nothing

    def to(self, device: torch.device) -> "TokenizedTexts":
        ids, mask = (each.to(device, non_blocking=True) for each in (self.ids, self.mask))
        return replace(self, ids=ids, mask=mask)

    def __getitem__(self, rows: Any) -> "TokenizedTexts":
        return replace(self, ids=self.ids[rows], mask=self.mask[rows])

    def __len__(self) -> int:
        return len(self.ids)


class Matcher(ABC):
    """The base of the image-text models, one subclass for each kind."""

    model: Any
    max_tokens: int  # the most tokens of a text, with [CLS] and [SEP]
    reader: Any  # the module that reads texts

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.tokenizer = backbone.model, backbone.tokenizer

    def tokenize(self, texts: list[str]) -> TokenizedTexts:
        """Return the token rows of texts."""
        tokenizer = self.tokenizer
        rows = [[tokenizer.cls_token_id, *plain_ids(tokenizer, text), tokenizer.sep_token_id] for text in texts]
        return TokenizedTexts(pad(rows, tokenizer.pad_token_id), mask_of(rows), len(set(map(len, rows))) < 2)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return the ViT's states (images, states, width) of images (images, 3, H, W)."""
        return self.project_vision(call(self.model.vision_model, pixel_values=pixel_values).last_hidden_state)

    def project_vision(self, states: Tensor) -> Tensor:
        """Return the ViT's states as they are: both heads read them."""
        return states

    def mask(self, texts: TokenizedTexts, mask: Tensor) -> Tensor | None:
        """Return the mask of the reader for tokens (texts, tokens), without reading a value from the device."""
        return bidirectional_mask(self.reader.config, mask, texts.is_full, mask.shape[1], self.reader.dtype)

    @abstractmethod
    def image_features(self, image_states: Tensor) -> Tensor:
        """Return unit vectors in the joint space (images, views, width), float32. BLIP-2 has one view for each query."""

    @abstractmethod
    def text_features(self, texts: TokenizedTexts) -> Tensor:
        """Return unit vectors in the joint space (texts, width), float32."""

    @abstractmethod
    def matching(self, image_states: Tensor, texts: TokenizedTexts) -> Tensor:
        """Return the log-odds (rows,), float32, that text i describes image i, by the ITM head."""


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Return the cosine of each text with the best view of each image, (images, texts).

    images: (images, views, width). texts: (texts, width). The result is float32 under autocast too: in bf16 the error of a
    cosine, divided by a temperature of 0.07, is 0.05.
    """
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat([(block @ texts.T).amax(1) for block in images.split(BLOCK)])


def log_odds(logits: Tensor) -> Tensor:
    """Return log p(match) − log p(no match), (rows,). logits: (rows, 2) for no match and match."""
    return logits[:, 1] - logits[:, 0]


def projected(head: Any, states: Tensor) -> Tensor:
    """Return a head's output, float32, computed in the dtype of its weights.

    Autocast is off: after its rounding, different log-odds would be equal.
    """
    with torch.autocast(states.device.type, enabled=False):
        dtype = head.weight.dtype if head.weight.is_floating_point() else torch.float32  # a checkpoint may store it in 8 bits
        return head(states.to(dtype)).float()


class BlipMatcher(Matcher):
    """BlipForImageTextRetrieval: one text encoder, used with cross-attention (ITM) and without (ITC)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.max_tokens = backbone.model.config.text_config.max_position_embeddings
        self.reader = backbone.model.text_encoder

    def image_features(self, image_states: Tensor) -> Tensor:
        return normalize(projected(self.model.vision_proj, image_states[:, :1]), dim=-1)

    def text_features(self, texts: TokenizedTexts) -> Tensor:
        mask = self.mask(texts, texts.mask)
        states = call(self.model.text_encoder, input_ids=texts.ids, attention_mask=mask).last_hidden_state
        return normalize(projected(self.model.text_proj, states[:, 0]), dim=-1)

    def matching(self, image_states: Tensor, texts: TokenizedTexts) -> Tensor:
        states = call(
            self.model.text_encoder, input_ids=texts.ids, attention_mask=self.mask(texts, texts.mask),
            encoder_hidden_states=image_states,
        )  # fmt: skip
        return log_odds(projected(self.model.itm_head, states.last_hidden_state[:, 0]))


class Blip2Matcher(Matcher):
    """Blip2ForImageTextRetrieval: the input of the Q-Former is the queries, a text, or both together."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.max_tokens = backbone.model.config.qformer_config.max_position_embeddings
        self.reader = backbone.model.qformer

    def image_features(self, image_states: Tensor) -> Tensor:
        queries = self.model.query_tokens.expand(len(image_states), -1, -1)
        states = call(self.model.qformer, query_embeds=queries, encoder_hidden_states=image_states).last_hidden_state
        return normalize(projected(self.model.vision_projection, states), dim=-1)

    def text_features(self, texts: TokenizedTexts) -> Tensor:
        embeds = call(self.model.embeddings, input_ids=texts.ids)
        states = call(
            self.model.qformer, query_embeds=embeds, query_length=0, attention_mask=self.mask(texts, texts.mask)
        ).last_hidden_state
        return normalize(projected(self.model.text_projection, states[:, 0]), dim=-1)

    def matching(self, image_states: Tensor, texts: TokenizedTexts) -> Tensor:
        queries = self.model.query_tokens.expand(len(texts), -1, -1)
        both = call(self.model.embeddings, input_ids=texts.ids, query_embeds=queries)
        mask = self.mask(texts, torch.cat([texts.mask.new_ones(queries.shape[:2]), texts.mask], dim=1))
        states = call(
            self.model.qformer, query_embeds=both, query_length=queries.shape[1], attention_mask=mask,
            encoder_hidden_states=image_states,
        ).last_hidden_state  # fmt: skip
        return log_odds(projected(self.model.itm_head, states[:, : queries.shape[1]]).mean(1))


def matcher_of(backbone: Backbone) -> Matcher:
    """Return the matcher for a backbone."""
    return BlipMatcher(backbone) if backbone.family == "blip" else Blip2Matcher(backbone)

"""Image-text models, BLIP's and BLIP-2's: a joint space for the contrast (ITC), and a head that reads both (ITM).

transformers gives the two heads one pair at a time; here each part is called by itself, so that an image
is looked at once and every text is read once, and padding is masked wherever it is read.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lora_blip.models.library import call
from lora_blip.models.loading import Backbone
from lora_blip.models.token_rows import mask_of, pad, plain_ids

BLOCK = 64  # images compared with all the texts at a time: each makes views × texts cosines


@dataclass(frozen=True)
class TokenizedTexts:
    """Token rows [CLS] text [SEP]."""

    ids: Tensor  # (texts, tokens)
    mask: Tensor  # (texts, tokens)

    def to(self, device: torch.device) -> "TokenizedTexts":
        return TokenizedTexts(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))

    def __getitem__(self, rows: Any) -> "TokenizedTexts":
        return replace(self, ids=self.ids[rows], mask=self.mask[rows])

    def __len__(self) -> int:
        return len(self.ids)


class Matcher:
    """How one kind of image-text model sees, reads and matches."""

    model: Any
    max_tokens: int  # tokens of a text, [CLS] and [SEP] among them

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.tokenizer = backbone.model, backbone.tokenizer

    def tokenize(self, texts: list[str]) -> TokenizedTexts:
        tokenizer = self.tokenizer
        rows = [[tokenizer.cls_token_id, *plain_ids(tokenizer, text), tokenizer.sep_token_id] for text in texts]
        return TokenizedTexts(pad(rows, tokenizer.pad_token_id), mask_of(rows))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(images, 3, H, W) → the ViT's states (images, patches, width)."""
        return call(self.model.vision_model, pixel_values=pixel_values).last_hidden_state

    def image_features(self, seen: Tensor) -> Tensor:
        """Unit vectors in the joint space (images, views, width), float32; BLIP-2 has a view for each query."""
        raise NotImplementedError

    def text_features(self, texts: TokenizedTexts) -> Tensor:
        """Unit vectors in the joint space (texts, width), float32."""
        raise NotImplementedError

    def matching(self, seen: Tensor, texts: TokenizedTexts) -> Tensor:
        """Log-odds (rows,), float32, that text i belongs to image i: both read together by the ITM head."""
        raise NotImplementedError


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """(images, views, width), (texts, width) → (images, texts): a text's cosine with the view that fits it best.

    float32 under autocast too: 8 bits of a cosine, over a temperature of 0.07, would be off by 0.05.
    """
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat([(some @ texts.T).amax(1) for some in images.split(BLOCK)])


def log_odds(logits: Tensor) -> Tensor:
    """(rows, 2) of no match and match → log p(match) − log p(no match), (rows,)."""
    return logits[:, 1] - logits[:, 0]


def projected(head: Any, states: Tensor) -> Tensor:
    """A head's output, float32: computed in the dtype of its own weights, under autocast too, where ten odds would be one."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(head.weight.dtype)).float()


class BlipMatcher(Matcher):
    """BlipForImageTextRetrieval: one text encoder, with and without its cross-attention."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.max_tokens = backbone.model.config.text_config.max_position_embeddings

    def image_features(self, seen: Tensor) -> Tensor:
        return normalize(projected(self.model.vision_proj, seen[:, :1]), dim=-1)

    def text_features(self, texts: TokenizedTexts) -> Tensor:
        states = call(self.model.text_encoder, input_ids=texts.ids, attention_mask=texts.mask).last_hidden_state
        return normalize(projected(self.model.text_proj, states[:, 0]), dim=-1)

    def matching(self, seen: Tensor, texts: TokenizedTexts) -> Tensor:
        states = call(self.model.text_encoder, input_ids=texts.ids, attention_mask=texts.mask, encoder_hidden_states=seen)
        return log_odds(projected(self.model.itm_head, states.last_hidden_state[:, 0]))


class Blip2Matcher(Matcher):
    """Blip2ForImageTextRetrieval: the Q-Former reads queries, texts, or both together."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.max_tokens = backbone.model.config.qformer_config.max_position_embeddings

    def image_features(self, seen: Tensor) -> Tensor:
        queries = self.model.query_tokens.expand(len(seen), -1, -1)
        states = call(self.model.qformer, query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        return normalize(projected(self.model.vision_projection, states), dim=-1)

    def text_features(self, texts: TokenizedTexts) -> Tensor:
        embeds = call(self.model.embeddings, input_ids=texts.ids)
        states = call(self.model.qformer, query_embeds=embeds, query_length=0, attention_mask=texts.mask).last_hidden_state
        return normalize(projected(self.model.text_projection, states[:, 0]), dim=-1)

    def matching(self, seen: Tensor, texts: TokenizedTexts) -> Tensor:
        queries = self.model.query_tokens.expand(len(texts), -1, -1)
        both = call(self.model.embeddings, input_ids=texts.ids, query_embeds=queries)
        mask = torch.cat([texts.mask.new_ones(queries.shape[:2]), texts.mask], dim=1)
        states = call(
            self.model.qformer, query_embeds=both, query_length=queries.shape[1], attention_mask=mask,
            encoder_hidden_states=seen,
        ).last_hidden_state  # fmt: skip
        return log_odds(projected(self.model.itm_head, states[:, : queries.shape[1]]).mean(1))


def matcher_of(backbone: Backbone) -> Matcher:
    return BlipMatcher(backbone) if backbone.family == "blip" else Blip2Matcher(backbone)

"""The losses of retrieval as functions of similarities: image-text contrast (ITC), and the negatives of matching (ITM)."""

import torch
from torch import Tensor


def itc_loss(similarity: Tensor, positives: Tensor, temperature: Tensor | float) -> Tensor:
    """Return the image-text contrast of each row, (rows,), float32.

    similarity: (rows, rows), the cosine of image i and text j. positives: (rows, rows), True if text j describes image i. All
    positives of a row have the same target probability. Let s = similarity / temperature. Let y be the positives, each row
    divided by its sum, and y' the positives, each column divided by its sum. Then row i of the result is
    ½ (−Σⱼ yᵢⱼ log softmaxⱼ sᵢⱼ − Σⱼ y'ⱼᵢ log softmaxⱼ sⱼᵢ): symmetric cross-entropy (Li et al. 2022, arXiv:2201.12086,
    section 3.2, without the momentum queue).
    """
    logits = similarity.float() / temperature

    def one_way(logits: Tensor, positives: Tensor) -> Tensor:
        targets = positives.float() / positives.sum(1, keepdim=True)
        return -(targets * logits.log_softmax(1)).sum(1)

    return (one_way(logits, positives) + one_way(logits.T, positives.T)) / 2


@torch.no_grad()
def hard_negatives(
    similarity: Tensor, positives: Tensor, temperature: Tensor | float, sampled: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the row of a wrong text for each image, and the row of a wrong image for each text, (rows,) each; −1: none.

    They are drawn with probability softmax(similarity / temperature) over the negatives, so similar pairs
    are drawn often (Li et al. 2021, arXiv:2107.07651, section 3.2). If `sampled` is false, they are the most probable ones.
    """

    def draw(logits: Tensor, positives: Tensor) -> Tensor:
        chances = logits.masked_fill(positives, -torch.inf).softmax(1).nan_to_num().clamp(min=1e-6).masked_fill(positives, 0)
        empty = positives.all(1)
        chances = chances.masked_fill(empty[:, None], 1)
        # torch.multinomial draws the same rows, but waits for the GPU to check the probabilities
        drawn = (chances / torch.empty_like(chances).exponential_(1) if sampled else chances).argmax(1)
        return drawn.masked_fill(empty, -1)

    logits = similarity.float() / temperature
    return draw(logits, positives), draw(logits.T, positives.T)

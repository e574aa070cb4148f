"""Tokenizers and image processors of the embedded bases, of the same kinds as those of the real checkpoints.

BLIP reads BERT's word pieces in lower case. BLIP-2's OPT reads a byte-level BPE, which can encode any text. Both split an
unknown word into pieces.
"""

import json
import random
import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from toyworld.scenes import SIZE
from toyworld.words import ENDINGS, WORDS, sentence

BLIP_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
OPT_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in facebook/opt


def blip_tokenizer() -> BertTokenizer:
    """Return a tokenizer of special tokens, printable ASCII characters (alone and within a word), endings and whole words."""
    characters = string.ascii_lowercase + string.digits
    pieces = [*BLIP_SPECIAL, *characters, *(f"##{c}" for c in characters), *string.punctuation]
    pieces += [f"##{e}" for e in ENDINGS if len(e) > 1] + [w for w in WORDS if len(w) > 1]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    special = {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=64, **special)


def opt_tokenizer(seed: int = 0, size: int = 1000) -> GPT2Tokenizer:
    """Return a byte-level BPE of `size` tokens, learned from the sentences without images. The last token is `<image>`."""
    rng = random.Random(seed)
    lines = [" ".join(WORDS)] * 40 + [sentence(rng) for _ in range(20_000)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(OPT_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    state = json.loads(bpe.to_str())["model"]
    tokenizer = GPT2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(m) for m in state["merges"]],
        unk_token="</s>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
        model_max_length=64,
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})

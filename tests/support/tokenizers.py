"""Small tokenizers of the classes of BLIP's and Flan-T5's, saved into a checkpoint. OPT's is that of the tiny models."""

import json
import string
from pathlib import Path

from transformers import T5Tokenizer

CHINESE = "红色的立方体日本語"


def save_bert(folder: Path, rows: int) -> None:
    """Write a vocabulary as the real ones are: vocab.txt without a token for [DEC], whose id is in the config."""
    letters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *string.punctuation]
    pieces += [*CHINESE, *"€½“”", "red", "cube", "blue", "##be"]
    assert len(pieces) == len(set(pieces)) <= rows - 2
    pieces += [f"[unused{number}]" for number in range(rows - 2 - len(pieces))]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "tokenize_chinese_chars": True,
        "strip_accents": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"bos_token_id": rows - 2, "sep_token_id": 3, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))


def save_t5(folder: Path) -> None:
    """Write a unigram tokenizer as SentencePiece's are: ▁ for a space, unknown characters, and <extra_id_0>."""
    words = ["▁", "▁a", "▁red", "▁cube", "▁blue", "▁on", "▁top", "▁of", "cu", "be", "é", "’", "½"]
    pieces = [("<filler>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -3.0) for word in words)]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=4)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "bos_token_id": 2,
        "decoder_start_token_id": 1,
    }  # in Flan-T5 too, bos is the end and the start is pad
    config["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    (folder / "config.json").write_text(json.dumps(config))

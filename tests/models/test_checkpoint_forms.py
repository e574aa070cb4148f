"""Checkpoints of older versions and other training programs load as in transformers, or raise one error with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_blip.errors import ModelError
from lora_blip.models.loading import ARCHITECTURES, load_backbone
from tests.support.models import WHOLE

pytestmark = pytest.mark.loads
Weights, Config = dict[str, Tensor], dict[str, Any]
Change = Callable[[Weights, Config], object]
BIAS, COPIED_BIAS = "text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias"
BERT = "text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"
HEADS = {  # the embeddings and the head of each kind that has both
    "blip": BERT, "vqa": BERT,
    "opt": ("language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"),
    "t5": ("language_model.shared.weight", "language_model.lm_head.weight"),
}  # fmt: skip


@pytest.fixture
def changed(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str, Change], Path]:
    """Return a function: changed("blip", change) copies a checkpoint and changes its weights and config."""

    def copy(kind: str, change: Change) -> Path:
        folder = tmp_path / kind
        shutil.copytree(checkpoints[kind], folder)
        weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        change(weights, config)
        save_file({key: value.clone() for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def by_transformers(folder: Path) -> Weights:
    config = json.loads((folder / "config.json").read_text())
    kinds = ARCHITECTURES[config["model_type"]]
    (kind,) = (kind for kind in kinds if kind.__name__ in config["architectures"])
    return kind.from_pretrained(folder, dtype=torch.float32).state_dict()


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# ---------------------------------------------------------------- forms that transformers reads


def head_saved(weights: Weights, kind: str, difference: float = 0.0) -> None:
    embeddings, head = HEADS[kind]
    weights[head] = weights[embeddings] + difference


def only_head(weights: Weights, kind: str) -> None:
    embeddings, head = HEADS[kind]
    weights[head] = weights.pop(embeddings)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("form", ["the head too", "only the head", "another head"])
def test_tied_and_untied_heads(changed, kind, form):
    def change(weights: Weights, _config: Config) -> None:
        if form == "only the head":
            only_head(weights, kind)
        else:
            head_saved(weights, kind, float(form == "another head"))

    folder = changed(kind, change)
    assert equal(load_backbone(str(folder), "cpu").model.state_dict(), by_transformers(folder))


@pytest.mark.parametrize("kind", WHOLE)
def test_weights_in_16_bits_with_position_ids_and_the_names_of_tensorflow(changed, kind, capsys):
    """Older versions saved the constant `position_ids`, and TensorFlow's BERT has gamma and beta. None of these is reported."""

    def change(weights: Weights, _config: Config) -> None:
        for name in list(weights):
            weights[name] = weights[name].half()
            if name.endswith("position_embeddings.weight"):
                weights[name.replace("position_embeddings.weight", "position_ids")] = torch.arange(64)[None]
            if "LayerNorm." in name:
                old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                weights[old] = weights.pop(name)

    folder = changed(kind, change)
    state = load_backbone(str(folder), "cpu").model.state_dict()
    assert equal(state, by_transformers(folder)) and {value.dtype for value in state.values()} == {torch.float32}
    assert capsys.readouterr().out == ""


def test_weights_in_several_files(changed, checkpoints):
    """Weights in several safetensors files load as those in one file."""
    folder = changed("t5", lambda _weights, _config: None)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert equal(load_backbone(str(folder), "cpu").model.state_dict(), by_transformers(checkpoints["t5"]))


def test_a_head_with_its_bias_under_either_name(changed):
    def change(weights: Weights, _config: Config) -> None:
        weights[COPIED_BIAS] = weights.pop(BIAS) + 1

    folder = changed("blip", change)
    state = load_backbone(str(folder), "cpu").model.state_dict()
    assert equal(state, by_transformers(folder)) and state[BIAS].min() >= 0.9


# ---------------------------------------------------------------- forms that transformers does not read


PREFIXES = ("module.", "model.", "blip.", "base_model.model.", "module._orig_mod.")


@pytest.mark.parametrize(("kind", "prefix"), [*zip(WHOLE, [*PREFIXES, "a.b.c."], strict=True)])
def test_a_prefix_of_all_names_is_removed_and_reported(changed, checkpoints, kind, prefix, tmp_path, capsys):
    """Of DistributedDataParallel, Lightning, peft's merged model and torch.compile. A copy that is saved has no prefix."""

    def change(weights: Weights, _config: Config) -> None:
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)

    model = load_backbone(str(changed(kind, change)), "cpu").model
    assert equal(model.state_dict(), by_transformers(checkpoints[kind]))
    out = capsys.readouterr().out
    assert f"begin with {prefix!r}, which is removed" in out and out.count("\n") == 1
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == load_file(checkpoints[kind] / "model.safetensors").keys()


def test_a_head_without_ties_of_older_transformers_keeps_its_bias(changed, capsys):
    """A checkpoint of an older version stores the head bias once. Both names of the bias get its values."""

    def change(weights: Weights, config: Config) -> None:
        head_saved(weights, "blip", 1.0)
        weights[BIAS] += torch.arange(len(weights[BIAS]))
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False

    state = load_backbone(str(changed("blip", change)), "cpu").model.state_dict()
    assert torch.equal(state[BIAS], state[COPIED_BIAS]) and state[BIAS].max() > 10
    assert f"{COPIED_BIAS} is a copy" in capsys.readouterr().out


# ---------------------------------------------------------------- differences


def test_weights_that_are_not_used_are_reported_in_one_line(changed, capsys):
    def change(weights: Weights, _config: Config) -> None:
        weights |= {f"text_encoder.pooler.{name}": torch.ones(2) for name in "abcd"}
        weights["ema\x1b[2J.decay"] = torch.ones(1)

    folder = changed("itm", change)
    assert equal(load_backbone(str(folder), "cpu").model.state_dict(), by_transformers(folder))
    out = capsys.readouterr().out
    assert "5 weights (" in out and "text_encoder.pooler.a, text_encoder.pooler.b, …) are not part of BlipForImage" in out
    assert out.count("\n") == 1 and "\x1b" not in out


def no_head(_weights: Weights, config: Config) -> None:
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False


DIFFERENT: dict[str, tuple[str, Change, str]] = {
    "missing weights": (
        "vqa", lambda weights, _: [weights.pop(name) for name in list(weights) if name.startswith("text_encoder.encoder")],
        r"lacks 5\d weights \(text_encoder\.encoder\.layer\.0\.[\w.]+, [\w.]+, [\w.]+, …\) of BlipForQuestion.*give another",
    ),
    "one missing weight": ("opt", lambda weights, _: weights.pop("query_tokens"), r"lacks 1 weight \(query_tokens\) of Blip2"),
    "no bias of the head": ("blip", lambda weights, _: weights.pop(BIAS), r"lacks 2 weights \(text_decoder\.cls"),
    "no head": ("opt", no_head, r'lacks 1 weight \(language_model\.lm_head\.weight\).*"tie_word_embeddings": true'),
    "another image size": (
        "blip", lambda weights, _: weights.update({"vision_model.embeddings.position_embedding": torch.zeros(1, 26, 32)}),
        r'position_embedding is \(1, 17, 32\).*images of 40×40: set "image_size": 40 in the vision_config',
    ),
    "positions of no square": (
        "blip", lambda weights, _: weights.update({"vision_model.embeddings.position_embedding": torch.zeros(1, 27, 32)}),
        r"position_embedding is .*copy config\.json and the weights again",
    ),
    "two prefixes": (
        "blip",
        lambda weights, _: weights.update({f"{p}{n}": weights[n] for p in ("a.", "b.") for n in list(weights)[-9:]}) or
        [weights.pop(name) for name in list(weights) if name.startswith("vision_model")],
        r"lacks \d+ weights \(vision_model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_checkpoint_of_another_model_is_one_error_that_names_the_weights(changed, what):
    kind, change, message = DIFFERENT[what]
    with pytest.raises(ModelError, match=message) as caught:
        load_backbone(str(changed(kind, change)), "cpu")
    assert len(str(caught.value)) < 600


def test_the_image_size_that_the_message_gives_loads(changed):
    def change(weights: Weights, config: Config) -> None:
        weights["vision_model.embeddings.position_embedding"] = torch.zeros(1, 26, 32)
        config["vision_config"]["image_size"] = 40

    assert load_backbone(str(changed("blip", change)), "cpu").image_size == 40

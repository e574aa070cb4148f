"""Test --explain: texts are those of the run, probabilities those of transformers, and rows of attention sum to 1."""

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lora_blip.config import InferConfig
from lora_blip.data.image_folders import example_of
from lora_blip.errors import ConfigError, ModelError
from lora_blip.inference import explanation, pipeline
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.output import FILE_NAME
from lora_blip.inference.pipeline import infer
from lora_blip.lora import adapter_file
from lora_blip.models import attention_maps
from lora_blip.models.attention_maps import token_maps, word_of_tokens
from lora_blip.models.token_rows import token_names
from lora_blip.reports.explanation import ImageView, TextView, WordView, write
from lora_blip.runtime.runs import EXPLAIN_NAME
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.text_task import language_of
from tests.reports.test_report import NASTY, Tags, picture, read
from tests.support import tiny
from tests.support.browser import show
from tests.support.commands import run_command
from tests.support.kill import run_processes
from tests.support.models import inject

ROOT = Path(__file__).resolve().parents[2]
PROMPT = {"vqa": "what color is it?"}


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def config(checkpoints, make, tmp_path, monkeypatch) -> InferConfig:
    """Return settings to explain three photos with an adapter that changes the texts. Change to their folder."""
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 3)
    backbone = make("blip")
    for lora in inject(backbone, "vit,text").values():
        lora.B.data.mul_(6)
    adapter_file.save(Path("adapter.safetensors"), backbone, task=CaptionTask(backbone).metadata())
    return InferConfig(
        adapter="adapter.safetensors", model=str(checkpoints["blip"]), images="photos", max_new_tokens=5, output_dir="out",
        device="cpu", explain=True,
    )  # fmt: skip


def lines_of(folder: str) -> dict[str, dict[str, Any]]:
    return {line["image"]: line for line in map(json.loads, Path(folder, FILE_NAME).read_text().splitlines())}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("merge", [True, False])
def test_the_texts_are_those_of_a_run_without_explain(config, capsys, beams, merge):
    """The text of the adapter equals its normal prediction, and that of the base the prediction of the base alone."""
    config = replace(config, num_beams=beams, merge=merge)
    infer(config)
    page = Path("out", EXPLAIN_NAME)
    assert f"explanation: {page.resolve().as_uri()}\n" in capsys.readouterr().out
    infer(replace(config, explain=False, output_dir="normal"))
    infer(replace(config, explain=False, adapter="none", output_dir="base"))
    assert not Path("normal", EXPLAIN_NAME).exists()
    normal, base = lines_of("normal"), lines_of("base")
    images = read(page)["images"]
    assert [image["image"] for image in images] == list(normal)
    for image in images:
        of_base, of_adapter = image["texts"]
        assert (of_base["model"], of_adapter["model"]) == ("base", "adapter")
        assert of_base["text"] == base[image["image"]]["text"] and of_adapter["text"] == normal[image["image"]]["text"]
        for text in image["texts"]:
            assert " ".join(word["word"] for word in text["words"]) == f"{text['text']} {explanation.END}"
    assert any(image["texts"][0]["text"] != image["texts"][1]["text"] for image in images)


def test_a_finished_run_explains_its_texts_again(config):
    """A resumed run, which generates nothing, writes the same page."""
    infer(config)
    first = read(Path("out", EXPLAIN_NAME))
    Path("out", EXPLAIN_NAME).unlink()
    infer(config)
    assert read(Path("out", EXPLAIN_NAME)) == first


def test_two_processes_write_the_page_of_one_process(config):
    """The main process explains all images, also those that the other one predicts."""
    config = replace(config, batch_size=1)
    infer(config)
    assert run_processes(2, lambda: infer(replace(config, output_dir="two"))) == [0, 0]
    assert read(Path("two", EXPLAIN_NAME)) == read(Path("out", EXPLAIN_NAME))


@pytest.mark.parametrize("kind", ["blip", "vqa", "opt", "t5"])
def test_probabilities_are_the_softmax_of_the_logits_of_transformers(make, kind):
    """In float64, and with rows of attention that sum to 1. The model computes the same as before afterwards."""
    backbone = make(kind, fast=True)
    inject(backbone)
    backbone.model.double().eval()
    language, prompt, text, images = language_of(backbone), PROMPT.get(kind, ""), "a red cube", pixels().double()
    implementations = [m.config._attn_implementation for m in backbone.model.modules() if hasattr(m, "config")]
    maps = token_maps(language, images, prompt, text)
    rows = language.tokenize([prompt], [text]).pad()
    with torch.no_grad():
        logits = library_logits(backbone.model, kind, images, rows)
    labelled, rounding = rows.targets[0] >= 0, 1e-6 if kind == "opt" else 1e-9  # OPT's eager softmax is float32
    expected = logits[0][labelled].softmax(-1)[torch.arange(len(maps.ids)), torch.tensor(maps.ids)]
    assert maps.probabilities.dtype == torch.float64 and maps.ids[-1] == language.end_id
    torch.testing.assert_close(maps.probabilities, expected, rtol=rounding, atol=1e-12)
    torch.testing.assert_close(maps.attention.sum(-1), torch.ones_like(maps.attention[..., 0]), rtol=0, atol=1e-9)
    assert (maps.attention >= 0).all() and maps.attention.shape[1] == len(maps.ids)
    states = backbone.model.vision_model(images).last_hidden_state.shape[1]
    assert maps.attention.shape[2] == states
    assert bool((maps.share == 1).all()) == (kind in ("blip", "vqa")) and (maps.share > 0).all() and (maps.share <= 1).all()
    assert implementations == [m.config._attn_implementation for m in backbone.model.modules() if hasattr(m, "config")]
    assert not any(m._forward_hooks for m in attention_maps.layers_of(language)[0])


def library_logits(model: Any, kind: str, images: torch.Tensor, rows: Any) -> torch.Tensor:
    """Return the logits by the public forward of transformers, with the adapters' hooks."""
    if kind == "blip":
        return model(pixel_values=images, input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    if kind == "opt":
        return model(pixel_values=images, input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    if kind == "t5":
        return model(
            pixel_values=images, input_ids=rows.input_ids, attention_mask=rows.attention_mask,
            decoder_input_ids=rows.decoder_input_ids,
        ).logits  # fmt: skip
    states = model.vision_model(images).last_hidden_state
    question = model.text_encoder(rows.input_ids, attention_mask=rows.attention_mask, encoder_hidden_states=states)
    return model.text_decoder(rows.decoder_input_ids, encoder_hidden_states=question.last_hidden_state).logits


@pytest.mark.parametrize("kind", ["blip", "vqa", "opt", "t5"])
def test_the_maps_are_those_of_the_attentions_that_transformers_returns(make, checkpoints, kind):
    """The formulas of the module, from `output_attentions=True` of a model that transformers loads with eager attention."""
    language = language_of(make(kind))
    maps = token_maps(language, pixels(), PROMPT.get(kind, ""), "a red cube")
    rows = language.tokenize([PROMPT.get(kind, "")], ["a red cube"]).pad()
    model = type(language.model).from_pretrained(checkpoints[kind], attn_implementation="eager").eval()
    with torch.no_grad():
        of_text, of_image = library_attentions(model, kind, pixels(), rows)
    labelled = rows.targets[0] >= 0
    for layer, attention in enumerate(of_text):
        own = attention[0].mean(0)[labelled]  # (tokens, keys), mean over the heads
        share = torch.ones(len(own))
        if kind in ("opt", "t5"):
            own = own[:, rows.input_ids[0] == model.config.image_token_index]
            share = own.sum(-1)
            own = own / share[:, None]
        if of_image:
            own = own @ torch.stack([each[0].mean(0) for each in of_image]).mean(0)
        torch.testing.assert_close(maps.attention[layer], own, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(maps.share[layer], share, rtol=1e-4, atol=1e-6)
    assert len(maps.attention) == len(of_text) == tiny.LAYERS
    assert maps.attention.std(-1).min() > 1e-4  # the maps are not flat, so the comparison could fail


def library_attentions(model: Any, kind: str, images: torch.Tensor, rows: Any) -> tuple[Any, Any]:
    """Return the attentions of each text layer, and of each layer over the image; each (1, heads, queries, keys)."""
    if kind in ("opt", "t5"):
        decoder = {"decoder_input_ids": rows.decoder_input_ids} if kind == "t5" else {}
        output = model(images, rows.input_ids, rows.attention_mask, output_attentions=True, **decoder)
        of_text = output.language_model_outputs
        queries = model.qformer(
            query_embeds=model.query_tokens,
            encoder_hidden_states=output.vision_outputs.last_hidden_state,
            output_attentions=True,
        )
        return of_text.cross_attentions if kind == "t5" else of_text.attentions, queries.cross_attentions
    states = model.vision_model(images).last_hidden_state
    decoder = model.text_decoder.bert
    if kind == "blip":
        return decoder(
            rows.input_ids, encoder_hidden_states=states, is_decoder=True, output_attentions=True
        ).cross_attentions, ()
    question = model.text_encoder(
        rows.input_ids, attention_mask=rows.attention_mask, encoder_hidden_states=states, output_attentions=True
    )
    answer = decoder(
        rows.decoder_input_ids, encoder_hidden_states=question.last_hidden_state, is_decoder=True, output_attentions=True
    )
    return answer.cross_attentions, question.cross_attentions


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["blip", "vqa", "opt", "t5"])
def test_maps_in_16_bits_are_those_of_32_bits_up_to_rounding(make, kind, dtype):
    if (kind, dtype) == ("t5", "fp16"):
        with pytest.raises(ModelError, match="NaN in fp16"):
            make(kind, dtype=dtype)
        return
    exact, rounded = (
        token_maps(
            language_of(backbone), pixels().to(next(backbone.model.parameters()).dtype), PROMPT.get(kind, ""), "a red cube"
        )
        for backbone in (make(kind), make(kind, dtype=dtype))
    )
    rounding = 0.05 if dtype == "bf16" else 0.01
    assert rounded.ids == exact.ids and rounded.attention.dtype == rounded.probabilities.dtype == torch.float32
    torch.testing.assert_close(rounded.probabilities, exact.probabilities, rtol=2 * rounding, atol=0)
    torch.testing.assert_close(rounded.attention, exact.attention, rtol=rounding, atol=rounding * float(exact.attention.mean()))
    torch.testing.assert_close(rounded.attention.sum(-1), torch.ones_like(rounded.attention[..., 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", [0.0, 0.48, float("nan")])
def test_a_layer_without_probabilities_is_an_error(row):
    """Rows of two keys that sum to 0, 0.96 and NaN. Rows that sum to 1 are recorded."""
    layer, good = torch.nn.Identity(), torch.full((1, 1, 2, 2), 0.5)
    with attention_maps.recorded([layer]) as probabilities:
        layer((torch.zeros(1, 2), good))
    assert len(probabilities) == 1 and probabilities[0] is good
    with pytest.raises(ModelError, match="returns no attention probabilities"), attention_maps.recorded([layer]):
        layer((torch.zeros(1, 2), torch.full((1, 1, 2, 2), row)))
    with pytest.raises(ModelError, match="returns no attention probabilities"), attention_maps.recorded([layer]):
        layer((torch.zeros(1, 2), None))


@pytest.mark.parametrize("text", ["a redcube , don't", "a red ##cube 3.5%", "字 é😀 a"])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_each_token_belongs_to_the_word_that_contains_it(make, kind, text):
    """The tokens of a word decode to the word, without spaces. Each token of a character belongs to the character's word."""
    language = language_of(make(kind))
    rows = language.tokenize([""], [text])
    ids = [id for id in rows.targets[0] if id >= 0][:-1]
    shown = language.texts_of(torch.tensor([ids]))[0].split()  # BLIP writes ", don't" as one word, and has no 字
    assert shown
    numbers = word_of_tokens(language, ids, shown)
    assert numbers == sorted(numbers) and len(numbers) == len(ids)
    for number, word in enumerate(shown):
        own = [id for id, each in zip(ids, numbers, strict=True) if each == number]
        assert "".join(language.texts_of(torch.tensor([own]))[0].split()) == word


@pytest.mark.parametrize("kind", ["blip", "opt"])
@pytest.mark.parametrize("text", ["a redcube, don't", "a redcube , don ' t", "##nnnn off"])
def test_a_word_has_the_product_and_the_mean_of_its_tokens(make, kind, text):
    """The words are those of the text, and together have each token once, in order. The last one is the end token."""
    task = CaptionTask(make(kind))
    maps = token_maps(task.language, pixels(), "", text)
    words = explanation.text_view(task, pixels(), example_of("x.png"), text, "base").words
    assert [word.word for word in words] == [*text.split(), explanation.END]
    assert max(len(word.tokens) for word in words) > 1
    start = 0
    for word in words:
        own = slice(start, start + len(word.tokens))
        start = own.stop
        assert word.layers is not None and word.share is not None
        assert [name for name, _ in word.tokens] == token_names(task.backbone.tokenizer, maps.ids[own])
        np.testing.assert_allclose([p for _, p in word.tokens], maps.probabilities[own])
        np.testing.assert_allclose(word.probability, maps.probabilities[own].double().prod())
        np.testing.assert_allclose(word.layers, maps.attention[:, own].double().mean(1))
        np.testing.assert_allclose(word.share, maps.share[:, own].double().mean(1))
    assert start == len(maps.ids)


def test_the_page_has_the_mean_of_the_layers_first(tmp_path):
    """A map has a byte per patch, and 255 is the largest patch; `peaks` and `class` have the attention itself."""
    layers = np.array([[0.2, 0.4, 0.1, 0.2, 0.1], [0.6, 0.0, 0.1, 0.2, 0.1]])  # the class token and 2 × 2 patches
    word = WordView("cube", 0.5, [("cube", 0.5)], layers, np.array([1.0, 0.5]))
    unknown = WordView("?", None, [], None, None)
    view = ImageView(picture(tmp_path / "a.png"), "", "", [TextView("base", "cube ?", [word, unknown])])
    page = write(tmp_path / EXPLAIN_NAME, [view], {}, "")
    known, other = read(page)["images"][0]["texts"][0]["words"]
    assert [list(base64.b64decode(each)) for each in known["maps"]] == [
        [255, 128, 255, 128],
        [255, 64, 128, 64],
        [0, 128, 255, 128],
    ]
    assert known["peaks"] == pytest.approx([0.2, 0.4, 0.2]) and known["class"] == pytest.approx([0.4, 0.2, 0.6])
    assert known["share"] == pytest.approx([0.75, 1, 0.5]) and (known["p"], known["tokens"]) == (0.5, [["cube", 0.5]])
    assert other == {"word": "?", "p": None, "tokens": []}


@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_in_a_browser(chromium, tmp_path, width):
    """A press on a word and a choice of a layer draw another map, over the part that the model sees."""
    rng = np.random.default_rng(0)
    words = [WordView(name, 0.5, [(name, 0.5)], rng.dirichlet(np.ones(5), 2), np.array([1.0, 0.5])) for name in ("a", NASTY[0])]
    words += [WordView("?", None, [], None, None), WordView(NASTY[5], None, [], None, None)]
    texts = [TextView(model, "a", words) for model in ("base", "adapter")]
    shot = picture(tmp_path / "a.png")
    views = [ImageView(shot, NASTY[1], NASTY[2], texts, (0.25, 0, 0.5, 1)), ImageView(tmp_path / "none.png", "", "", [])]
    page = write(tmp_path / EXPLAIN_NAME, views, {"images": NASTY[3]}, "formula")
    chromium.get_log("browser")
    show(chromium, page, width)
    ask = chromium.execute_script
    assert chromium.get_log("browser") == [] and ask("return window.pwned") is None
    assert ask("return document.documentElement.scrollWidth") <= width
    names = ask("return [...document.querySelectorAll('.model.adapter bdi')].map(name => name.textContent)")
    assert names == ["a", NASTY[0], "?", NASTY[5]]  # the script is a text, not an element
    draw = """const canvas = document.querySelector('.model.adapter canvas');
              return Array.from(canvas.getContext('2d').getImageData(0, 0, 2, 2).data).filter((_, index) => index % 4 == 3);"""
    pressed = "return [...document.querySelectorAll('.model.adapter button')].map(b => b.getAttribute('aria-pressed'))"
    maps = [ask(draw)]
    assert ask(pressed) == ["true", "false", "false", "false"] and min(maps[0]) == 0  # the largest patch is not dark
    ask("document.querySelectorAll('.model.adapter button')[1].click()")
    maps.append(ask(draw))
    assert ask(pressed) == ["false", "true", "false", "false"]
    assert ask("return document.querySelectorAll('.model.adapter button')[2].disabled")
    ask("const s = document.querySelector('[name=layer]'); s.value = 2; s.dispatchEvent(new Event('input', {bubbles: true}));")
    maps.append(ask(draw))
    assert len({tuple(each) for each in maps}) == 3
    assert "50 % of the attention is on the image" in ask(
        "return document.querySelector('.model.adapter .details').textContent"
    )
    box = "const [c, s] = ['canvas', 'img'].map(n => document.querySelector('.shot ' + n).getBoundingClientRect());"
    assert ask(
        box + "return [(c.left - s.left) / s.width, (c.right - s.left) / s.width, c.height / s.height]"
    ) == pytest.approx([0.25, 0.75, 1], abs=0.01)
    assert (
        ask("return document.getElementById('images').textContent.split('The model sees only a part of this image').length")
        == 2
    )  # of one image


def test_more_than_the_limit_and_rankings_are_refused(config, monkeypatch, checkpoints):
    """The error is raised before the first prediction, and leaves no folder."""
    monkeypatch.setattr(explanation, "LIMIT", 2)
    with pytest.raises(ConfigError, match=r"at most 2 images"):
        infer(config)
    with pytest.raises(ConfigError, match="a ranking has none"):
        infer(replace(config, texts="a cube|a ball"))
    with pytest.raises(ConfigError, match="a ranking has none"):
        infer(replace(config, adapter="none", model=str(checkpoints["itm"]), texts="a|b"))
    assert not Path("out").exists()


@pytest.mark.parametrize("step", ["explain", "write_explanation"])
def test_an_error_while_explaining_does_not_end_the_run(config, monkeypatch, capsys, step):
    """It is reported, and the predictions are those of a run without --explain."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory left")

    module = explanation if step == "explain" else pipeline
    monkeypatch.setattr(module, step, fail)
    infer(config)
    output = capsys.readouterr().out
    names = ["explanation of the base", "explanation of the adapter"] if step == "explain" else ["explanation"]
    for name in names:
        assert f"warning: no {name} (RuntimeError: no memory left); nothing else is affected\n" in output
    assert not Path("out", EXPLAIN_NAME).exists() and "explanation: " not in output
    infer(replace(config, explain=False, compare=True, output_dir="normal"))
    assert Path("out", FILE_NAME).read_bytes() == Path("normal", FILE_NAME).read_bytes()


def test_the_page_explains_one_model_if_the_other_fails(config, monkeypatch):
    real = explanation.explain

    def explain(*arguments: Any) -> Any:
        if arguments[-1] == "base":
            raise RuntimeError("no memory left")
        return real(*arguments)

    monkeypatch.setattr(explanation, "explain", explain)
    infer(config)
    images = read(Path("out", EXPLAIN_NAME))["images"]
    assert [[text["model"] for text in image["texts"]] for image in images] == [["adapter"]] * 3


@pytest.mark.parametrize(
    ("kind", "formula"),
    [("blip", "over the patches, mean"), ("vqa", "answer decoder"), ("opt", "query tokens"), ("t5", "query tokens")],
)
def test_every_model_that_generates_has_a_page_with_its_formula(config, checkpoints, capsys, kind, formula):
    question = PROMPT.get(kind, "")
    infer(replace(config, adapter="none", model=str(checkpoints[kind]), question=question))
    assert "warning: no explanation" not in capsys.readouterr().out
    page = Path("out", EXPLAIN_NAME)
    assert formula in page.read_text("utf-8")
    predicted = lines_of("out")
    for image in read(page)["images"]:
        (text,) = image["texts"]
        assert image["question"] == question and text["text"] == printable(predicted[image["image"]]["text"])
        assert text["words"][-1]["word"] == explanation.END and len(text["words"][-1]["maps"]) == tiny.LAYERS + 1
        part_on_image = text["words"][-1]["share"]
        assert all(share < 1 for share in part_on_image) == (kind in ("opt", "t5"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_16_bits_is_explained(config, precision, capsys):
    infer(replace(config, precision=precision))
    assert "warning: no explanation" not in capsys.readouterr().out
    for image in read(Path("out", EXPLAIN_NAME))["images"]:
        for text in image["texts"]:
            assert all(0 < word["p"] <= 1 and len(word["maps"]) == tiny.LAYERS + 1 for word in text["words"])


def test_the_map_covers_the_part_of_the_image_that_a_cropping_processor_keeps(config, checkpoints):
    """The photos are 40 pixels wide and 30, 31 and 32 high; the processor keeps a square in the middle."""
    folder = Path(shutil.copytree(checkpoints["blip"], "cropping"))
    size = {"height": tiny.SIDE, "width": tiny.SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": tiny.SIDE}, crop_size=size).save_pretrained(folder)
    Path("photos/3.png").write_bytes(b"broken")
    infer(replace(config, adapter="none", model=str(folder)))
    *images, broken = read(Path("out", EXPLAIN_NAME))["images"]
    assert broken["part"] == [0, 0, 1, 1] and "is not a usable image" in broken["picture"]["problem"]
    infer(replace(config, adapter="none", output_dir="whole"))
    assert [image["part"] for image in read(Path("whole", EXPLAIN_NAME))["images"]] == [[0, 0, 1, 1]] * 4
    for image, height in zip(images, (30, 31, 32), strict=True):
        assert image["part"] == pytest.approx([(1 - height / 40) / 2, 0, height / 40, 1], abs=0.02)


def test_an_image_that_cannot_be_read_shows_why(config):
    Path("photos/1.png").write_bytes(b"broken")
    infer(config)
    images = {Path(image["image"]).name: image for image in read(Path("out", EXPLAIN_NAME))["images"]}
    assert images["1.png"]["texts"] == [] and "is not a usable image" in images["1.png"]["picture"]["problem"]
    assert len(images["2.png"]["texts"]) == 2


def page_of(folder: Path, texts: list[str]) -> Path:
    """Write the page of an image for each text, with the text in every field."""
    folder.mkdir()
    shot, layers = picture(folder / "a.png"), np.full((2, 5), 0.2)
    views = [
        ImageView(shot, text, text, [TextView("base", text, [WordView(text, 0.5, [(text, 0.5)], layers, np.ones(2))])])
        for text in texts
    ]
    return write(folder / EXPLAIN_NAME, views, {"images": texts[0], texts[1]: texts[2]}, texts[0] + texts[1])


def test_untrusted_texts_add_no_tag_to_the_page(tmp_path):
    page, plain = page_of(tmp_path / "odd", NASTY), page_of(tmp_path / "plain", ["a", "b", "c", "d", "e", "f"][: len(NASTY)])
    tags, plain_tags = ([tag for tag, _ in Tags(path.read_text("utf-8")).tags if tag != "wbr"] for path in (page, plain))
    assert tags == plain_tags


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return the exit status, stdout and stderr of `lora-blip`."""
    return run_command(monkeypatch, capsys, *arguments, "--device", "cpu")


def page_in(errors: str) -> dict[str, Any]:
    """Return the data of the page whose address a short command prints on stderr."""
    (line,) = [line for line in errors.splitlines() if line.startswith("explanation: ")]
    path = Path(line.removeprefix("explanation: file://"))
    assert path.parent.parent == Path("lora_blip_output").resolve() and path.name == EXPLAIN_NAME
    return read(path)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_caption_prints_the_same_with_and_without_explain(config, monkeypatch, capsys, flags):
    """The page has the printed texts, and those of the base."""
    Path("photos/1.png").write_bytes(b"broken")
    arguments = ("caption", "photos", "--adapter", config.adapter, "--model", config.model, *flags)
    status, printed, errors = command(monkeypatch, capsys, *arguments, "--explain")
    assert (status, printed) == command(monkeypatch, capsys, *arguments)[:2] and status == 1
    images = page_in(errors)["images"]
    assert [len(image["texts"]) for image in images] == [2, 0, 2] and "usable image" in images[1]["picture"]["problem"]
    readable = ["photos/0.png", "photos/2.png"]
    base, adapted = (
        Captioner.from_adapter(adapter, base=config.model, device="cpu")(readable) for adapter in (None, config.adapter)
    )
    assert [p.text for p in base] != [p.text for p in adapted]
    for image, *predictions in zip([images[0], images[2]], base, adapted, strict=True):
        for text, prediction in zip(image["texts"], predictions, strict=True):
            assert text["text"] == prediction.text


def test_the_probabilities_of_the_words_give_the_score_of_the_prediction(monkeypatch, capsys, tmp_path):
    """The score is the geometric mean over the tokens and the end token, of a trained model that generates natural texts."""
    monkeypatch.chdir(tmp_path)
    base, images = str(ROOT / "assets" / "tiny-blip"), [str(ROOT / "image_test" / f"00{number}.png") for number in range(3)]
    _, _, errors = command(monkeypatch, capsys, "caption", *images, "--adapter", "none", "--model", base, "--explain")
    predictions = Captioner.from_adapter(None, base=base, device="cpu")(images)
    for image, prediction in zip(page_in(errors)["images"], predictions, strict=True):
        words = image["texts"][0]["words"]
        count = sum(len(word["tokens"]) for word in words)
        assert count > 3 and np.prod([word["p"] for word in words]) ** (1 / count) == pytest.approx(prediction.score, rel=1e-4)


@pytest.mark.usefixtures("config")
def test_ask_prints_the_same_with_and_without_explain(monkeypatch, capsys):
    vqa = str(ROOT / "assets" / "tiny-blip-vqa")
    arguments = ("ask", "photos/0.png", "what color is it ?", "--adapter", "none", "--model", vqa)
    status, printed, errors = command(monkeypatch, capsys, *arguments, "--explain")
    assert (status, printed) == command(monkeypatch, capsys, *arguments)[:2] and status == 0
    (image,) = page_in(errors)["images"]
    (text,) = image["texts"]
    assert image["question"] == "what color is it ?" and printed == f"photos/0.png: {text['text']}\n"
    assert text["model"] == "base" and text["words"][0]["maps"]


def test_the_short_commands_refuse_as_without_explain(config, monkeypatch, capsys):
    """Too many images, another task, and a folder that cannot be written end with status 2 and without a page."""
    base = ("--adapter", "none", "--model", config.model)
    other_task = ("caption", "photos/0.png", "--adapter", "none", "--model", str(ROOT / "assets" / "tiny-blip-vqa"))
    for arguments in (other_task, ("caption", "nowhere.png", *base), ("ask", "photos/0.png", "", *base)):
        plain = command(monkeypatch, capsys, *arguments)
        assert command(monkeypatch, capsys, *arguments, "--explain") == plain and plain[0] == 2
    monkeypatch.setattr(explanation, "LIMIT", 2)
    status, _, errors = command(monkeypatch, capsys, "caption", "photos", *base, "--explain")
    assert status == 2 and "at most 2 images" in errors
    assert not Path("lora_blip_output").exists()
    Path("lora_blip_output").touch()
    status, _, errors = command(monkeypatch, capsys, "caption", "photos/0.png", *base, "--explain")
    assert status == 2 and "lora_blip_output" in errors and "not a folder" in errors
    assert "start the command in a folder that can be written" in errors and "--output-dir" not in errors  # it has no such flag

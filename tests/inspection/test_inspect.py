"""`lora-blip inspect`: its numbers are those of numpy, it works without the base, and untrusted names are escaped."""

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_blip import cli
from lora_blip.inspection.command import InspectConfig, inspect
from lora_blip.inspection.description import _training
from lora_blip.lora import adapter_file, injection, merging
from lora_blip.lora.adapter_file import digest
from lora_blip.lora.spectrum import intruder_dimensions
from lora_blip.models.loading import load_backbone
from tests.support.api import save_adapter
from tests.support.browser import show

BASE = Path(__file__).resolve().parents[2] / "assets" / "tiny-blip" / "model.safetensors"
QKV = "vision_model.encoder.layers.1.self_attn.qkv"
FC = "layers.0.mlp.fc"
SWAPPED = {f"{FC}1": "tmp", f"{FC}2": f"{FC}1", "encoder.tmp": f"encoder.{FC}2"}  # the names of fc1 and fc2
NASTY = '</script><img src=x onerror="window.pwned = 1">\x1b[31m<!-- data -->'


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("runs") / "run_a" / "adapter.safetensors", 0, size=0.3)


def data_of(folder: Path) -> dict[str, Any]:
    page = (folder / "inspect.html").read_text("utf-8")
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["lora-blip", "inspect", *arguments])
    cli.main()
    return capsys.readouterr().out


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def changed(source: Path, target: Path, rename: dict[str, str] | None = None, **header: Any) -> Path:
    """Write a copy of an adapter file with other names of modules and other entries of the header, and return its path."""
    adapter, names = adapter_file.read(source), rename or {}

    def new(text: str) -> str:
        for old, name in names.items():
            text = text.replace(old, name)
        return text

    metadata = json.loads(json.dumps(adapter.metadata)) | header
    modules = {new(key): entry | {"module": new(entry["module"])} for key, entry in metadata["lora"]["modules"].items()}
    metadata["lora"]["modules"] = modules
    metadata["base"]["samples"] = {new(key): value for key, value in metadata["base"]["samples"].items()}
    tensors = {new(key): value for key, value in adapter.tensors.items()}
    metadata["sha256"] = digest(tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, {"lora_blip": json.dumps(metadata)})
    return target


# ---------------------------------------------------------------- numbers


def test_the_terminal_shows_the_extreme_updates_with_the_columns_near_the_end(adapter, tmp_path, monkeypatch, capsys):
    """Without --all: three largest and three smallest updates, their columns, and how to read them. With it: all, in order."""
    lines = run(monkeypatch, capsys, str(adapter), "--output-dir", str(tmp_path / "a")).splitlines()
    modules = data_of(tmp_path / "a")["adapters"][0]["modules"]
    ordered = sorted(modules, key=lambda module: -module["relative_norm"])
    printed = [line.split()[0] for line in lines if line.startswith("vision_model.")]
    assert printed == [module["address"] for module in ordered[:3] + ordered[-3:]] and len(modules) == 16
    assert any(line.startswith("… 10 modules between") for line in lines)
    (head,) = (number for number, line in enumerate(lines) if "eff. rank" in line and "singular values" in line)
    assert len(lines) - head < 13 and any("eff. rank: how many" in line for line in lines[head:])
    everything = run(monkeypatch, capsys, str(adapter), "--output-dir", str(tmp_path / "b"), "--all").splitlines()
    assert [line.split()[0] for line in everything if line.startswith("vision_model.")] == [m["address"] for m in modules]
    heads = [number for number, line in enumerate(everything) if "singular values" in line]
    assert len(heads) == 2 and everything[heads[1] - 1].startswith(modules[-1]["address"])


def test_the_similarity_of_two_adapters_is_short_too(adapter, tmp_path, monkeypatch, capsys):
    other = save_adapter(tmp_path / "run_b" / "adapter.safetensors", 1)
    words = (str(adapter), str(other), "--output-dir", str(tmp_path), "--model", "none")
    table = run(monkeypatch, capsys, *words).partition("subspace similarity")[2]
    assert table.count("vision_model.") == 6 and "… 10 modules between" in table and "both adapters read" in table


def test_the_numbers_of_a_module_are_those_of_numpy(adapter, tmp_path, monkeypatch, capsys):
    """Singular values, effective rank, ‖ΔW‖, ‖ΔW‖/‖W‖, intruders and amplification, by the SVD of the full matrices."""
    output = run(monkeypatch, capsys, str(adapter), "--output-dir", str(tmp_path), "--all")
    modules = {module["address"]: module for module in data_of(tmp_path)["adapters"][0]["modules"]}
    file, base = adapter_file.read(adapter), load_file(BASE)
    assert [*modules] == [site.address for site in file.sites] and len(modules) == 16
    for address, module in modules.items():
        A, B = (file.tensors[f"{address}.lora_{half}"].double().numpy() for half in "AB")
        W, delta = base[f"{address}.weight"].double().numpy(), 4.0 * B @ A
        U, S, Vh = np.linalg.svd(delta)
        np.testing.assert_allclose(module["singular_values"], S[:8], rtol=1e-5)
        p = S[:8] / S[:8].sum()
        assert module["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
        assert module["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert module["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(W), rel=1e-5)
        before, after = (np.linalg.svd(M, full_matrices=False)[0] for M in (W, W + delta))
        assert module["intruders"] == (np.abs(after[:, :10].T @ before).max(1) < 0.5).sum()
        inside = U[:, :8].T @ W @ Vh[:8].T
        assert module["amplification"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(inside), rel=1e-5)
        row = next(line for line in output.splitlines() if line.startswith(f"{address} "))
        assert f" {module['relative_norm']:.2%}" in row and f" {module['effective_rank']:.2f} " in row
    assert any(module["intruders"] for module in modules.values())


def test_the_shares_of_the_parts_add_up(tmp_path, monkeypatch, capsys, adapter):
    """The share of a part is that of its Σ ‖ΔW‖². The name of a module decides its part."""
    other = changed(adapter, tmp_path / "x.safetensors", {"vision_model.encoder.layers.3": "text_decoder.bert.encoder.layer.3"})
    run(monkeypatch, capsys, str(other), "--output-dir", str(tmp_path / "out"), "--model", "none")
    view = data_of(tmp_path / "out")["adapters"][0]
    assert [(part["name"], part["modules"]) for part in view["parts"]] == [("ViT", 12), ("text", 4)]
    squares = [module["norm"] ** 2 for module in view["modules"]]
    assert view["parts"][1]["share"] == pytest.approx(sum(squares[12:]) / sum(squares), rel=1e-4)
    assert sum(part["share"] for part in view["parts"]) == pytest.approx(1, rel=1e-5)
    assert sum(part["parameters"] for part in view["parts"]) == 65536
    assert [(module["group"], module["layer"], module["kind"]) for module in view["modules"][-4:]] == [
        ("text_decoder.bert.encoder.layer", 3, kind) for kind in ("self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2")
    ]


def test_two_adapters_are_compared_by_the_formula_of_the_paper(adapter, tmp_path, monkeypatch, capsys):
    other = save_adapter(tmp_path / "run_b" / "adapter.safetensors", 1)
    partner = changed(other, tmp_path / "partner.safetensors", {"layers.3.mlp.fc2": "layers.7.mlp.fc2"})
    output = run(monkeypatch, capsys, str(adapter), str(partner), "--output-dir", str(tmp_path), "--model", "none")
    data = data_of(tmp_path)
    assert data["alone"] == [
        "vision_model.encoder.layers.3.mlp.fc2: only in the first adapter",
        "vision_model.encoder.layers.7.mlp.fc2: only in the second adapter",
    ]
    assert all(line in output for line in data["alone"])
    assert len(data["pairs"]) == 15
    files = [adapter_file.read(path) for path in (adapter, partner)]
    for pair in data["pairs"]:
        u, v = (np.linalg.svd(file.tensors[f"{pair['address']}.lora_A"].double().numpy())[2] for file in files)
        phi = [[np.linalg.norm(u[:i] @ v[:j].T) ** 2 / min(i, j) for j in range(1, 9)] for i in range(1, 9)]
        shown = np.frombuffer(base64.b64decode(pair["phi"]), np.uint8).reshape(pair["rows"], pair["columns"]) / 255
        np.testing.assert_allclose(shown, phi, atol=0.0021)
        assert (pair["first"], pair["all"]) == (pytest.approx(phi[0][0], rel=1e-4), pytest.approx(phi[-1][-1], rel=1e-4))
        width = files[0].tensors[f"{pair['address']}.lora_A"].shape[1]
        assert pair["chance"] == pytest.approx(8 / width, rel=1e-4)


def test_an_adapter_is_similar_to_itself(adapter, tmp_path):
    inspect(InspectConfig(adapters=[str(adapter)] * 2, model="none", output_dir=str(tmp_path)))
    assert {round(pair["all"], 5) for pair in data_of(tmp_path)["pairs"]} == {1.0}


def test_modules_of_different_widths_are_listed(adapter, tmp_path):
    swapped = changed(adapter, tmp_path / "x.safetensors", SWAPPED)
    inspect(InspectConfig(adapters=[str(adapter), str(swapped)], model="none", output_dir=str(tmp_path)))
    assert "vision_model.encoder.layers.0.mlp.fc1: 128 and 512 input features" in data_of(tmp_path)["alone"]


def test_a_block_of_a_fused_linear_is_compared_with_its_rows(tmp_path):
    """An adapter of q alone: ‖W‖ is that of the rows of q."""
    import lora_blip

    backbone = lora_blip.load_backbone("assets/tiny-blip", "cpu")
    for lora in lora_blip.inject(backbone, "vit.k").values():
        torch.nn.init.normal_(lora.B)
    path = lora_blip.save_adapter(tmp_path / "k.safetensors", backbone)
    inspect(InspectConfig(adapters=[str(path)], output_dir=str(tmp_path)))
    module = data_of(tmp_path)["adapters"][0]["modules"][1]
    assert (module["address"], module["kind"]) == (f"{QKV}.k", "self_attn.qkv.k")
    W = load_file(BASE)[f"{QKV}.weight"][128:256].double()
    assert module["norm"] / module["relative_norm"] == pytest.approx(float(W.norm()), rel=1e-5)


# ---------------------------------------------------------------- the base


def test_without_the_base_a_note_says_what_is_left_out(adapter, tmp_path, monkeypatch, capsys):
    """A base that is not on this machine is no error, and nothing is downloaded; the rest is measured."""
    base = json.loads(json.dumps(adapter_file.read(adapter).metadata["base"])) | {"name": "someone/gone-blip"}
    away = changed(adapter, tmp_path / "away.safetensors", base=base)
    output = run(monkeypatch, capsys, str(away), "--output-dir", str(tmp_path / "1"))
    assert "The base 'someone/gone-blip' was not read (it is not on this machine), so ‖ΔW‖ / ‖W‖, intruder" in output
    assert "To read it: --model FOLDER_OR_HUB_NAME" in output
    module = data_of(tmp_path / "1")["adapters"][0]["modules"][0]
    assert module["relative_norm"] is module["intruders"] is module["amplification"] is None
    assert module["effective_rank"] > 1 and "intruders" not in output.split("\n\n")[2]
    found = run(monkeypatch, capsys, str(away), "--output-dir", str(tmp_path / "2"), "--model", "assets/tiny-blip")
    assert "intruders" in found and "was not read" not in found
    none = run(monkeypatch, capsys, str(adapter), "--output-dir", str(tmp_path / "3"), "--model", "none")
    assert "The base was not read (--model none)" in none


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "assets/tiny-blip-vqa",
            "the weights of 'vision_model.encoder.layers.0.self_attn.qkv' in 'assets/tiny-blip-vqa' are not",
        ),
        ("assets/tiny-blipp", "did you mean 'assets/tiny-blip'"),
    ],
)
def test_another_base_is_an_error(adapter, tmp_path, monkeypatch, capsys, model, message):
    error = refused(monkeypatch, capsys, str(adapter), "--output-dir", str(tmp_path), "--model", model)
    assert message in error and not (tmp_path / "inspect.html").exists()


def test_a_base_without_the_module_or_of_another_shape_is_an_error(adapter, tmp_path, monkeypatch, capsys):
    missing = changed(adapter, tmp_path / "a.safetensors", {"layers.3": "layers.9"})
    assert "has no linear 'vision_model.encoder.layers.9.self_attn.qkv'" in refused(
        monkeypatch, capsys, str(missing), "--output-dir", str(tmp_path), "--model", "assets/tiny-blip"
    )
    other = changed(adapter, tmp_path / "b.safetensors", SWAPPED)
    error = refused(monkeypatch, capsys, str(other), "--output-dir", str(tmp_path), "--model", "assets/tiny-blip")
    assert "'vision_model.encoder.layers.0.mlp.fc2' of 'assets/tiny-blip' is (128, 512), and the update is 512 × 128" in error


# ---------------------------------------------------------------- header, files, mistakes


def test_a_run_with_max_steps_has_no_number_of_epochs():
    """The run may end in its first epoch, and EPOCHS is then no number of passes."""
    assert _training({"steps": 1}, {"epochs": 30, "max_steps": 0, "lr": 1e-3}) == "1 step, 30 epochs, lr 0.001"
    assert _training({"steps": 1}, {"epochs": 30, "max_steps": 1, "lr": 1e-3}) == "1 step, lr 0.001"


def test_the_header_is_described_in_words(adapter, tmp_path, monkeypatch, capsys):
    """Task, prompt, base, data, training and scores. The scores before the training are those of metrics.jsonl."""
    training = {"steps": 1200, "finished": False, "val_loss": 0.25, "val_exact_match": 0.975}
    settings = {
        "annotations": "data/train.jsonl",
        "val_fraction": 0.1,
        "epochs": 3,
        "batch_size": 8,
        "lr": 1e-4,
        "targets": "vit",
    }
    task = {"name": "caption", "prompt": "a photo of", "generation": {"num_beams": 3}}
    drift = {"largest_difference": 1.4e-5, "largest_logit": 16.0}
    path = changed(
        adapter, tmp_path / "run" / "best.safetensors", task=task, training=training | {"settings": settings}, merge_drift=drift
    )
    path.with_name("metrics.jsonl").write_text('{"step": 0, "val_loss": 2.5, "val_exact_match": 0.0}\n')
    output = run(monkeypatch, capsys, str(path.parent), "--output-dir", str(tmp_path / "out"))
    for line in (
        "  adapter   16 modules, r = 8, alpha = 32, 65,536 parameters",
        "  task      write a caption, after the prompt “a photo of”; generation: num_beams = 3",
        "  base      assets/tiny-blip (BlipForConditionalGeneration), images of 96×96",
        "  data      data/train.jsonl, 10% held out",
        "  training  1,200 steps, stopped before its end, 3 epochs, batches of 8, lr 0.0001, targets vit",
        "  scores    validation loss 0.2500 (before the training 2.5000), exact match 97.5% (before the training 0.0%)",
        "  merge     merged and hooked logits differ by at most 1.4e-05; the largest logit is 16",
    ):
        assert line in output.splitlines()
    page = (tmp_path / "out" / "inspect.html").read_text("utf-8")
    assert "after the prompt “a photo of”" in page and '<h1 dir="auto">run</h1>' in page


def test_untrusted_names_are_escaped(adapter, tmp_path, monkeypatch, capsys):
    """Names of modules, texts of the header and numbers of any size reach neither the terminal nor the page as commands."""
    training = {"val_loss": 10**400, "val_x<b>": 0.5, "settings": {"annotations": "a<b>", "lr": 10**400, "epochs": [NASTY] * 9}}
    base = json.loads(json.dumps(adapter_file.read(adapter).metadata["base"])) | {"architecture": NASTY}
    versions = {NASTY: NASTY}
    path = changed(
        adapter, tmp_path / "x.safetensors", {"layers.3.mlp": NASTY}, training=training, base=base, versions=versions,
        task={"name": "other <i>", "generation": {"x": [1]}}, merge_drift={"largest_difference": 10**400, "a<b>": 1e-7},
    )  # fmt: skip
    output = run(monkeypatch, capsys, str(path), "--output-dir", str(tmp_path), "--model", "none")
    assert "\x1b" not in output and r"\x1b[31m" in output
    page = (tmp_path / "inspect.html").read_text("utf-8")
    assert "\x1b" not in page and page.count("<script") == 2
    assert not [text for text in ("<img", "other <i>", "a<b>", "x<b>") if text in page]
    assert NASTY.split("\x1b")[0] in data_of(tmp_path)["adapters"][0]["modules"][14]["address"]


def test_mistakes_are_reported_before_torch_is_loaded(adapter, tmp_path, monkeypatch, capsys):
    def refuse(_: object) -> None:
        raise AssertionError("the command ran")

    monkeypatch.setitem(cli.COMMANDS, "inspect", cli.COMMANDS["inspect"]._replace(run=refuse))
    near = refused(monkeypatch, capsys, str(adapter.parent.parent / "run_aa"))
    assert f"did you mean '{adapter.parent}'?" in near
    three = refused(monkeypatch, capsys, *[str(adapter)] * 3)
    assert "3 adapters are given; give one, or two to compare: lora-blip inspect RUN OTHER_RUN" in three
    assert "did you mean --output-dir?" in refused(monkeypatch, capsys, str(adapter), "--output", "x")
    (tmp_path / "inspect.html").write_text("mine")
    assert "exists already" in refused(monkeypatch, capsys, str(adapter), "--output-dir", str(tmp_path))
    assert (tmp_path / "inspect.html").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert "it is not a folder" in refused(monkeypatch, capsys, str(adapter), "--output-dir", str(tmp_path / "file"))


def test_each_inspection_has_its_own_folder(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(monkeypatch, capsys, str(adapter), "--model", "none")
    assert len([*tmp_path.glob("lora_blip_output/inspection_*/inspect.html")]) == 2
    assert not [*adapter.parent.glob("*.html")]


# ---------------------------------------------------------------- the page


def test_the_page_loads_nothing_from_the_network(adapter, tmp_path):
    inspect(InspectConfig(adapters=[str(adapter)], model="none", output_dir=str(tmp_path)))
    text = (tmp_path / "inspect.html").read_text("utf-8")
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"data:,"}
    assert "default-src &#x27;none&#x27;" in text and "of report.html */" not in text and "<!-- " not in text
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|fetch|XMLHttpRequest)\b", text)


@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_in_a_browser(chromium, adapter, tmp_path, width):
    """Both adapters, untrusted names, the maps and the table: no message of the browser, and no scrolling to the side."""
    other = changed(adapter, tmp_path / "x.safetensors", {"layers.3.mlp": NASTY, "layers.2": "layers.12"})
    inspect(InspectConfig(adapters=[str(adapter), str(other)], model="none", output_dir=str(tmp_path)))
    chromium.get_log("browser")
    show(chromium, tmp_path / "inspect.html", width)
    ask = chromium.execute_script
    assert chromium.get_log("browser") == [] and ask("return window.pwned") is None
    assert ask("return document.documentElement.scrollWidth") <= width
    assert ask("return document.querySelectorAll('#maps .cell:not(.absent)').length") == 16
    assert ask("return document.querySelectorAll('#pairs canvas').length") == 10
    assert ask("return document.querySelectorAll('.modules tbody tr').length") == 16
    search = """const query = document.querySelector('[name=query]'); query.value = arguments[0];
                query.dispatchEvent(new Event('input', {bubbles: true}));"""
    ask(search, "layers.1 qkv")
    assert ask("return document.getElementById('count').textContent") == "1 of 16 modules"
    ask("document.querySelector('.modules tbody button').click()")
    assert ask("return document.querySelector('dialog[open] h2').textContent") == QKV
    assert ask("return document.querySelectorAll('dialog .spectrum rect').length") == 16  # of both adapters
    ask("document.querySelector('dialog').close(); const s = document.querySelector('[name=adapter]'); s.value = 1;")
    ask("document.querySelector('[name=adapter]').dispatchEvent(new Event('input', {bubbles: true}))")
    ask(search, "onerror")
    assert ask("return document.getElementById('count').textContent") == "2 of 16 modules"
    assert ask("return window.pwned") is None


def test_the_numbers_of_dora_are_those_of_the_merged_weight(tmp_path, monkeypatch, capsys):
    """The norms and the intruder dimensions compare W with the W′ that a merge writes; the singular values are those of B A."""
    backbone = load_backbone("assets/tiny-blip", "cpu")
    W = {path: module.weight.clone() for path, module in backbone.model.named_modules() if isinstance(module, torch.nn.Linear)}
    loras = injection.inject(backbone.model, "vit[1:2]", r=4, variant="dora")
    for number, lora in enumerate(loras.values()):
        torch.manual_seed(number)
        torch.nn.init.normal_(lora.B, std=0.3)
        lora.magnitude.data *= torch.rand(len(lora.magnitude)) + 0.5
    path = adapter_file.save(tmp_path / "run" / "adapter.safetensors", backbone)
    merging.merge(backbone.model)
    out = run(monkeypatch, capsys, str(path), "--output-dir", str(tmp_path / "page"))
    assert "variant   DoRA" in out and f"{sum(p.numel() for x in loras.values() for p in x.parameters()):,} parameters" in out
    (view,) = data_of(tmp_path / "page")["adapters"]
    for module in view["modules"]:
        linear, lora = backbone.model.get_submodule(module["address"]), loras[module["address"]]
        change = linear.weight - W[module["address"]]
        assert module["norm"] == pytest.approx(change.norm().item(), rel=1e-4)
        assert module["relative_norm"] == pytest.approx((change.norm() / W[module["address"]].norm()).item(), rel=1e-4)
        assert module["intruders"] == intruder_dimensions(W[module["address"]], change)
        expected = torch.linalg.svdvals(lora.delta_weight())[:4].tolist()
        assert module["singular_values"] == pytest.approx(expected, rel=1e-4)

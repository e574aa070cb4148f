"""The public API: quick to import, typed, with examples that run, and clear errors for wrong first guesses."""

import doctest
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_blip
from lora_blip import errors
from lora_blip.errors import AdapterError, ConfigError, InputError, LoRAError, ModelError, TargetError
from lora_blip.lora import attached, targets
from lora_blip.lora.sites import Site
from lora_blip.models.local_base import locate_base
from tests.support.api import ROOT, make_workplace

FIXTURE = Path(__file__).parent / "fixtures/v1/adapters/caption_blip/lora_bs4_ep20_lr0.02_r2_a4_20261128_011018"
NAMES = [name for name in lora_blip.__all__ if name != "__version__"]
METHODS = ["from_adapter", "__call__", "answer", "rank", "stream"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    make_workplace(folder)
    return folder


def test_an_import_loads_no_library():
    """`python -c "import lora_blip"` takes as long as Python itself."""
    program = "import sys, lora_blip; print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_name_is_listed_once_and_is_found():
    assert sorted(lora_blip.EXPORTS) == sorted(NAMES) and set(NAMES) <= set(dir(lora_blip))
    for name in NAMES:
        assert getattr(lora_blip, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'captioner'"):
        lora_blip.captioner  # noqa: B018


def documented() -> list[tuple[str, Any]]:
    functions = [(name, getattr(lora_blip, name)) for name in NAMES]
    return functions + [(f"Captioner.{name}", getattr(lora_blip.Captioner, name)) for name in METHODS]


@pytest.mark.parametrize("name", NAMES)
def test_every_docstring_names_the_operation_of_peft_and_has_an_example(name):
    text = inspect.getdoc(getattr(lora_blip, name)) or ""
    assert "In peft: " in text and ">>> " in text


EXAMPLES = [  # the metrics of an evaluation start Java
    pytest.param(*each, id=each[0], marks=pytest.mark.slow if each[0] == "evaluate" else ()) for each in documented()
]


@pytest.mark.parametrize(("name", "documented"), EXAMPLES)
def test_every_example_runs(name, documented, workplace, monkeypatch, capsys):
    """In a folder with photos and a run, with the backbone that the docstring of the package describes."""
    monkeypatch.chdir(workplace)
    names = {"lora_blip": lora_blip, "torch": torch, "Path": Path}
    if "backbone" in (inspect.getdoc(documented) or ""):
        names["backbone"] = lora_blip.load_backbone("assets/tiny-blip")
    if name in ("Captioner.__call__", "Captioner.stream"):
        names["captioner"] = lora_blip.Captioner.from_adapter("latest")
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, name, globs=names)
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    starts = ("path = lora_blip.train", "folder", "predictions =")
    with_prints = [each for each in example.examples if each.source.startswith(starts)]
    for each in with_prints:  # a run prints its progress, which is not part of the example
        exec(each.source, example.globs)
    example.examples = [each for each in example.examples if each not in with_prints]
    assert runner.run(example).failed == 0, capsys.readouterr().out
    Path("copy.safetensors").unlink(missing_ok=True)


TYPED = """
from pathlib import Path
import lora_blip
from lora_blip import Captioner, EvaluateConfig, InferConfig, LoRA, LoraBlipError, Prediction, TrainConfig

def predict(captioner: Captioner, image: Path) -> list[str]:
    one: Prediction = captioner(image)
    many: list[Prediction] = captioner([image, "b.png", b"bytes"], strict=True)
    answer: Prediction = captioner.answer(image, "what color is it?")
    answers: list[Prediction] = captioner.answer([image], ["what color is it?"])
    ranked: list[tuple[str, float]] = captioner.rank(image, ["a", "b"]).ranking
    texts = [prediction.text for prediction in captioner.stream(iter([image]))]
    score: float | None = one.score
    return [*texts, one.error, answer.text, many[0].text, answers[0].question, ranked[0][0], str(score)]

def adapters(name: str) -> dict[str, LoRA]:
    backbone = lora_blip.load_backbone(name, device="cpu", dtype="fp32")
    sites = lora_blip.find_targets(backbone, ["vit", "text:r=4"], r=8, alpha=32.0)
    loras: dict[str, LoRA] = lora_blip.inject(backbone, sites, name="a") | lora_blip.inject(backbone.model, "vit", r=4)
    adapter = lora_blip.load_adapter(backbone, Path("run"), name="b")
    with lora_blip.use_adapters(backbone, ["a", None]), lora_blip.disable_adapters(backbone, adapter.base):
        pass
    lora_blip.merge(backbone, "a")
    lora_blip.restore(backbone)
    lora_blip.bake(backbone.model)
    lora_blip.eject(backbone)
    path: Path = lora_blip.save_adapter("a.safetensors", backbone)
    return loras if path else {}

def run(version: str = lora_blip.__version__) -> tuple[Path, Path, Path]:
    try:
        folder = lora_blip.evaluate(EvaluateConfig(references=version))
        return lora_blip.train(TrainConfig(r=4)), lora_blip.infer(InferConfig()), folder
    except LoraBlipError as error:
        raise SystemExit(str(error)) from None

captioner: Captioner = Captioner.from_adapter("latest", base="", device="auto", precision="fp32", batch_size=4)
"""


@pytest.mark.slow
def test_a_file_that_uses_every_name_passes_mypy_strict(tmp_path):
    """The types of the package reach the user, and a wrong argument is an error."""
    assert (
        all(f"lora_blip.{name}" in TYPED or f" {name}" in TYPED for name in NAMES) and (ROOT / "lora_blip/py.typed").is_file()
    )
    (tmp_path / "right.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(TYPED.replace("one: Prediction = captioner(image)", "one: str = captioner(image)"))

    def mypy(name: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=",
            "--follow-imports=silent",
            "--ignore-missing-imports",
        ]
        return subprocess.run([*command, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True, check=False)

    assert mypy("right.py").returncode == 0, mypy("right.py").stdout
    assert "wrong.py:7: error: Incompatible types in assignment" in mypy("wrong.py").stdout
    (tmp_path / "typo.py").write_text("import lora_blip\nfrom lora_blip import Captionner\nlora_blip.injects\n")
    found = mypy("typo.py").stdout
    assert 'has no attribute "Captionner"' in found and 'has no attribute "injects"' in found


# ---------------------------------------------------------------- first guesses


def test_a_backbone_is_accepted_wherever_its_model_is(make):
    """`inject(backbone, "vit")` and each other verb change the same model as with `backbone.model`."""
    ours, theirs = make("blip"), make("blip")
    loras = lora_blip.inject(ours, "vit.q,text")
    sites = lora_blip.find_targets(theirs, "vit.q,text")
    assert sites == lora_blip.find_targets(theirs.model, ["vit.q", "text"]) == [lora.site for lora in loras.values()]
    assert list(loras) == list(lora_blip.inject(theirs.model, sites))
    for lora in loras.values():
        lora.B.data.normal_()
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    with lora_blip.use_adapters(ours, "default"), lora_blip.disable_adapters(ours):
        pass
    lora_blip.merge(ours)
    assert not all(torch.equal(before[name], value) for name, value in ours.model.state_dict().items())
    lora_blip.restore(ours)
    assert all(torch.equal(before[name], value) for name, value in ours.model.state_dict().items())
    lora_blip.bake(ours)
    lora_blip.eject(theirs)
    assert not attached.names(ours.model) and not attached.names(theirs.model)


def test_a_dtype_is_a_name_or_a_dtype_of_torch():
    for dtype in ("bf16", torch.bfloat16):
        backbone = lora_blip.load_backbone("assets/tiny-blip", "cpu", dtype)
        assert backbone.model.vision_model.embeddings.patch_embedding.weight.dtype == torch.bfloat16


def test_a_folder_of_runs_is_not_a_base(tmp_path):
    """The folder of a demo contains its run; a first guess gives it as the base."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter.safetensors").touch()
    with pytest.raises(ModelError, match=r"is an adapter, and not a base.*from_adapter\("):
        lora_blip.load_backbone(str(tmp_path))


def test_there_is_one_default_of_r_and_alpha():
    """The settings, `Site`, `find_targets` and `inject` agree, so that Python and train.py train the same."""
    config = lora_blip.TrainConfig()
    for function in (lora_blip.find_targets, lora_blip.inject):
        defaults = inspect.signature(function).parameters
        assert (defaults["r"].default, defaults["alpha"].default) == (config.r, config.alpha) == (8, 32.0)
    assert (Site("0").r, Site("0").alpha) == (config.r, config.alpha)
    assert targets.parse("vit:r=2", 8, 32.0).alpha == 8.0  # a target with r alone keeps alpha / r


def test_an_adapter_is_a_file_a_run_folder_or_the_latest(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (file,) = Path("lora_blip_output/caption_tiny-blip_vit").glob("*.safetensors")
    loaded = []
    for path in (file, str(file), file.parent, str(file.parent)):
        backbone = lora_blip.load_backbone("assets/tiny-blip", "cpu")
        loaded.append(lora_blip.load_adapter(backbone, path).path)
        assert len(attached.adapters(backbone.model)) == 16
    assert set(loaded) == {file}


@pytest.mark.parametrize("name", sorted(lora_blip.OF_PEFT))
def test_a_name_of_peft_gives_the_call_here(name):
    call = lora_blip.OF_PEFT[name]
    assert callable(getattr(lora_blip, call.split("(")[0].split(".")[0]))
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; the equivalent here is lora_blip\.{re.escape(call)}"):
        getattr(lora_blip, name)


def test_the_bare_name_of_an_embedded_base_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate_base("tiny-blip2") == locate_base("assets/tiny-blip2") != ""
    (tmp_path / "tiny-blip2").mkdir()
    assert locate_base("tiny-blip2") == "tiny-blip2"  # a folder of the user comes first


from_adapter = lora_blip.Captioner.from_adapter
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a run without a model": (
        lambda _: lora_blip.load_adapter("some run"), LoRAError,  # type: ignore[arg-type]
        r"the first argument is of type str; .*load it first: backbone = lora_blip\.load_backbone",
    ),
    "a list of names": (
        lambda b: lora_blip.merge(b, ["a", "b"]), LoRAError,  # type: ignore[arg-type]
        r"merge takes names, not a list; call lora_blip\.merge\(backbone, 'a', 'b'\)",
    ),
    "a name for a model": (
        lambda _: lora_blip.inject("assets/tiny-blip", "vit"), LoRAError,  # type: ignore[arg-type]
        r"load it first: backbone = lora_blip\.load_backbone\('assets/tiny-blip'\)",
    ),
    "an adapter for a model": (
        lambda _: lora_blip.merge("latest"), LoRAError,  # type: ignore[arg-type]
        r"'latest' is an adapter: .*lora_blip\.load_adapter\(backbone, 'latest'\)",
    ),
    "a processor for a base that has one": (
        lambda b: from_adapter(None, base=b, processor=object()), InputError, "a processor is given, but the base has its own",
    ),
    "a processor for a name": (
        lambda _: from_adapter(None, base="assets/tiny-blip", processor="x"), InputError, "leave processor out",
    ),
    "a dict to train": (
        lambda _: lora_blip.train({"lr": 0.1}), ConfigError,  # type: ignore[arg-type]
        r"lora_blip\.train\(lora_blip\.TrainConfig\(\*\*settings\)\)",
    ),
    "settings of another call": (
        lambda _: lora_blip.evaluate(lora_blip.InferConfig()), ConfigError,  # type: ignore[arg-type]
        r"lora_blip\.evaluate\(lora_blip\.EvaluateConfig\(references='test\.jsonl'\)\)",
    ),
    "a text as image size": (
        lambda _: lora_blip.load_backbone("assets/tiny-blip", image_size="64"), ConfigError,  # type: ignore[arg-type]
        "image_size = '64': expected a whole number, such as 96",
    ),
    "a number with a point as image size": (
        lambda _: lora_blip.load_backbone("assets/tiny-blip", image_size=64.0), ConfigError,  # type: ignore[arg-type]
        r"image_size = 64\.0: expected a whole number",
    ),
    "a text as a truth value": (
        lambda _: lora_blip.load_backbone("assets/tiny-blip", fast="no"), ConfigError,  # type: ignore[arg-type]
        "fast = 'no': expected True or False",
    ),
    "an empty path to save to": (
        lambda b: lora_blip.save_adapter("", b, overwrite=True), AdapterError, "the path '.' is not that of a file; give one",
    ),
    "a folder to save to": (
        lambda b: lora_blip.save_adapter("lora_blip", b, overwrite=True), AdapterError, "is not that of a file",
    ),
    "no references": (
        lambda _: lora_blip.EvaluateConfig(), ConfigError, r"\(in Python: EvaluateConfig\(references='test\.jsonl'\)\)",
    ),
    "targets first": (
        lambda b: lora_blip.find_targets("vit", b), LoRAError, r'swapped; call lora_blip\.find_targets\(backbone, "vit"\)',
    ),
    "targets first in inject": (
        lambda b: lora_blip.inject("vit", b.model), LoRAError, r'swapped; call lora_blip\.inject\(backbone, "vit"\)',
    ),
    "the adapter first": (
        lambda b: lora_blip.load_adapter("latest", b), LoRAError,
        r'swapped; call lora_blip\.load_adapter\(backbone, "latest"\)',
    ),
    "the name first": (
        lambda b: lora_blip.use_adapters("default", b).__enter__(), LoRAError,
        r'swapped; call lora_blip\.use_adapters\(backbone, "default"\)',
    ),
    "a loaded base to load": (lora_blip.load_backbone, ModelError, "it is loaded already"),
    "a loaded model to load": (lambda b: lora_blip.load_backbone(b.model), ModelError, "it is loaded already"),
    "an adapter to load": (lambda _: lora_blip.load_backbone("latest"), ModelError, r"from_adapter\('latest'\) loads both"),
    "a file of an adapter to load": (lambda _: lora_blip.load_backbone("best.safetensors"), ModelError, "is an adapter, and"),
    "a number to load": (lambda _: lora_blip.load_backbone(3), ModelError, "give a hub name or a folder"),  # type: ignore[arg-type]
    "a base as an adapter": (from_adapter, InputError, r"Captioner\.from_adapter\(None, base=backbone\)"),
    "a base for a captioner": (lora_blip.Captioner, InputError, r"from_adapter\(None, base=backbone\)$"),
    "no adapter to merge": (lora_blip.merge, LoRAError, r'call lora_blip\.load_adapter\(backbone, "latest"\)'),
    "no adapter to bake": (lora_blip.bake, LoRAError, r'call lora_blip\.load_adapter\(backbone, "latest"\)'),
    "a wrong rank": (lambda b: lora_blip.inject(b, "vit", r=2.5), LoRAError, r"^r=2\.5: expected a whole number from 1 to"),  # type: ignore[arg-type]
    "rank 0": (lambda b: lora_blip.inject(b, "vit", r=0), LoRAError, r"^r=0: expected a whole number .*, such as r=8"),
    "a truth value as rank": (lambda b: lora_blip.find_targets(b, "vit:alpha=4", r=True), LoRAError, r"^r=True: expected"),
    "a text as alpha": (lambda b: lora_blip.inject(b, "vit", alpha="a"), LoRAError, r"^alpha='a': expected a positive"),  # type: ignore[arg-type]
    "an unknown variant": (lambda b: lora_blip.find_targets(b, "vit", variant=3), LoRAError, "^variant=3: expected one of"),  # type: ignore[arg-type]
    "a number as target": (lambda b: lora_blip.find_targets(b, 5), TargetError, "the target 5 is of type int; give a text"),  # type: ignore[arg-type]
    "numbers as targets": (lambda b: lora_blip.find_targets(b, [5]), TargetError, "the target 5 is of type int; give a text"),  # type: ignore[list-item]
    "a number as name": (lambda b: lora_blip.inject(b, "vit", name=5), LoRAError, "adapter name 5 is not allowed"),  # type: ignore[arg-type]
    "a list as name": (lambda b: lora_blip.inject(b, "vit", name=[]), LoRAError, r"adapter name \[\] is not"),  # type: ignore[arg-type]
    "an empty name to eject": (lambda b: lora_blip.eject(b, ""), LoRAError, "the model has no adapter ''"),
    "a number as device": (
        lambda _: lora_blip.load_backbone("assets/tiny-blip", device=5), ModelError, "device '5' cannot be used",  # type: ignore[arg-type]
    ),
    "a path to train": (
        lambda _: lora_blip.train("vit"), ConfigError,  # type: ignore[arg-type]
        r"train expects TrainConfig, and not str: lora_blip\.train\(lora_blip\.TrainConfig\(\)\)",
    ),
    "a folder to caption": (lambda _: lora_blip.infer("image_test"), ConfigError, "infer expects InferConfig"),
    "an adapter to score": (
        lambda _: lora_blip.evaluate("latest"), ConfigError, "evaluate expects EvaluateConfig",  # type: ignore[arg-type]
    ),
    "the name first in merge": (
        lambda b: lora_blip.merge("default", b), LoRAError,  # type: ignore[arg-type]
        r'swapped; call lora_blip\.merge\(backbone, "default"\)',
    ),
    "the name first in eject": (
        lambda b: lora_blip.eject("default", b), LoRAError,  # type: ignore[arg-type]
        r'swapped; call lora_blip\.eject\(backbone, "default"\)',
    ),
    "the name first in a block": (
        lambda b: lora_blip.disable_adapters("default", b).__enter__(), LoRAError,  # type: ignore[arg-type]
        r'swapped; call lora_blip\.disable_adapters\(backbone, "default"\)',
    ),
    "a base for a name": (
        lambda b: lora_blip.use_adapters(b, b).__enter__(), LoRAError, 'give a name, such as "default", or a list',
    ),
    "nothing to load": (
        lambda b: lora_blip.load_adapter(b, None), AdapterError,  # type: ignore[arg-type]
        'of type NoneType; give a run folder, a file, or "latest"',
    ),
    "an array for an adapter": (lambda _: from_adapter(torch.zeros(3)), AdapterError, "of type Tensor; give a run folder"),
    "a dtype without a name": (
        lambda _: lora_blip.load_backbone("assets/tiny-blip", dtype=torch.float64), ConfigError,
        'expected "fp32", "fp16", "bf16", "int8" or "nf4"',
    ),
    "a module": (lambda b: lora_blip.inject(b, [b.model.vision_model]), LoRAError, r"lora_blip\.inject\(model, 'vit'\)"),
    "no path to save to": (lambda b: lora_blip.save_adapter(b, "a.safetensors"), AdapterError, "the path comes first"),
    "a base for an adapter": (
        lambda _: from_adapter("Salesforce/blip-vqa-base"), AdapterError,
        r"If it is a base: lora_blip\.Captioner\.from_adapter\(None, base='Salesforce/blip-vqa-base'\)",
    ),
    "nothing": (lambda _: from_adapter(None), InputError, "base is empty; give one, such as base="),
    "no from_adapter": (lambda _: lora_blip.Captioner("latest"), InputError, r"Captioner\.from_adapter\('latest'\)"),
    "no processor": (lambda backbone: from_adapter(None, base=backbone.model), InputError, "processor=transformers"),
    "another base": (lambda _: from_adapter(None, base=torch.nn.Linear(2, 2)), InputError, "base is of type Linear; give"),
}  # fmt: skip


def test_a_run_in_place_of_a_base_gives_the_calls_for_an_adapter(tmp_path):
    """A run has a config.json too, with the settings of its training."""
    run = tmp_path / "runs" / "caption_1"
    shutil.copytree(FIXTURE, run)
    for path in (run, run.parent, run / "adapter.safetensors"):
        with pytest.raises(ModelError, match=r"is an adapter, and not a base.*Captioner\.from_adapter"):
            lora_blip.load_backbone(str(path))
        for call in (lora_blip.load_adapter, lora_blip.merge):
            with pytest.raises(LoRAError, match=r"is an adapter: first load its base.* lora_blip\.load_adapter\(backbone, "):
                call(str(path))  # type: ignore[operator]


def test_every_error_of_the_package_can_be_imported_from_it():
    """`except lora_blip.InputError` works. A name that is no error stays unknown."""
    found = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(found) > 10 and all(getattr(lora_blip, name) is getattr(errors, name) for name in found)
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchError'"):
        lora_blip.NoSuchError  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(("call", "kind", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_first_guess_gives_the_right_call(make, call, kind, message):
    with pytest.raises(kind, match=message):
        call(make("blip"))

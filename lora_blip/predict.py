"""Inference in batches: images → captions, answers or ranked texts, printed, written, and scored where references are given."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm  # comes with transformers

from lora_blip import adapter, lora
from lora_blip.adapter import Adapter
from lora_blip.config import ConfigError, EvaluateConfig, InferConfig, refuse_unwritable
from lora_blip.data import annotations
from lora_blip.data.annotations import Example
from lora_blip.data.images import find_images
from lora_blip.loop import seed_everything
from lora_blip.models import Backbone, open_backbone
from lora_blip.run import fresh
from lora_blip.runner import Runner
from lora_blip.tasks import TASKS, natural_task
from lora_blip.tasks.task import Generation, Task

FILE_NAME = "predictions.jsonl"
RANKS_KEPT = 10  # of a ranking: written beside the best text
Ranking = list[tuple[str, float]]  # texts, the likeliest first, with their probabilities


@dataclass(frozen=True)
class Prediction:
    image: Path
    text: str
    question: str = ""
    ranking: Ranking = field(default_factory=list)  # where texts were ranked


def infer(config: InferConfig) -> Path:
    """Caption, answer or rank as `config` says; returns the path of predictions.jsonl, a line an image and question.

    Raises ConfigError, ModelError, AdapterError, ImageError or DataError before any image is looked at.
    """
    seed_everything(config.seed)
    images = find_images(config.images)
    references = read_references(config.references, config.image_root, images)
    texts = read_texts(config.texts)
    wanted = wanted_adapter(config.adapter)
    output = output_file(config.output_dir)  # refused now if it exists; made when there is something to write
    task, precision = open_task(config, wanted)
    examples = asked(task, images, config.question, references, texts)
    print(described(task, wanted, len(examples), precision))

    base: dict[Any, Prediction] = {}
    runner = Runner(task, config.batch_size, precision, lambda: open_task(config, wanted, adapted=False, device="cpu")[0])
    if config.compare and wanted:
        base = {task.subject(e): p for e, p in progress(predictions(runner, examples, texts), len(examples), "base")}
    if wanted:
        put_on(task := runner.task, wanted, config.merge)
        runner.reopen = lambda: open_task(config, wanted, adapted=True, device="cpu")[0]
    said: dict[Any, Prediction] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("x", encoding="utf-8") as file:
        for example, prediction in progress(predictions(runner, examples, texts), len(examples), task.name):
            key = task.subject(example)
            said[key] = prediction
            file.write(json.dumps(line_of(prediction, base.get(key)), ensure_ascii=False) + "\n")
            tqdm.write(printed(prediction, base.get(key)))
    report(task, references, said, base)
    print(f"wrote {output}")
    return output


# ---------------------------------------------------------------- from your own Python


def captions(task: Task, images: Iterable[str | Path], batch_size: int = 16, precision: str = "fp32") -> Iterator[Prediction]:
    """Captions in the order of `images`, a batch at a time; an image that cannot be read is reported and left out."""
    yield from (p for _, p in predictions(Runner(task, batch_size, precision), map(example_of, images)))


def answers(
    task: Task, questions: Iterable[tuple[str | Path, str]], batch_size: int = 16, precision: str = "fp32"
) -> Iterator[Prediction]:
    """Answers to (image, question) pairs, in their order."""
    examples = (example_of(image, question) for image, question in questions)
    yield from (p for _, p in predictions(Runner(task, batch_size, precision), examples))


def rankings(
    task: Task, images: Iterable[str | Path], texts: list[str], question: str = "", precision: str = "fp32"
) -> Iterator[Prediction]:
    """For each image all the texts by how well they fit, with probabilities that sum to 1."""
    examples = (example_of(image, question) for image in images)
    yield from (p for _, p in predictions(Runner(task, precision=precision), examples, texts))


def example_of(image: str | Path, question: str = "") -> Example:
    return Example(Path(image), "", str(image), 0, question=question)


def predictions(
    runner: Runner, examples: Iterable[Example], texts: list[str] | None = None
) -> Iterator[tuple[Example, Prediction]]:
    """Each example with what the task says of it, or with the texts ranked where there are some."""
    if texts:
        found = runner.run(examples, lambda task, pictures, some: task.rank(pictures, some, texts).cpu())
        for example, row in found:
            order = sorted(zip(texts, row.tolist(), strict=True), key=lambda pair: -pair[1])
            yield example, Prediction(example.image, order[0][0], example.question, order)
        return
    for example, text in runner.run(examples, lambda task, pictures, some: task.predict(pictures, some)):
        yield example, Prediction(example.image, text, example.question)


# ---------------------------------------------------------------- set-up


def wanted_adapter(name: str) -> Adapter | None:
    return None if name in ("", "none") else adapter.read(adapter.locate(name))


def open_task(
    config: InferConfig | EvaluateConfig, wanted: Adapter | None, adapted: bool = False, device: str = ""
) -> tuple[Task, str]:
    """The backbone that the settings and the adapter name, with its task; the adapter is merged in if `adapted`."""
    name = config.model or (wanted.base if wanted else "")
    backbone, precision = open_backbone(name, device or config.device, "fp32" if device else config.precision)
    task = task_of(backbone, wanted, config)
    if adapted and wanted:
        put_on(task, wanted, merge=True)
    return task, precision


def put_on(task: Task, wanted: Adapter, merge: bool) -> None:
    """The adapter onto the task's backbone, with what it learned beside the weights."""
    adapter.load(task.backbone, wanted)
    if merge:
        lora.bake(task.backbone.model)
    if wanted.task.get("name") == task.name:
        task.recall(wanted.task)


def task_of(backbone: Backbone, wanted: Adapter | None = None, config: InferConfig | EvaluateConfig | None = None) -> Task:
    """The task that an adapter was trained for, with its prompt and generation, where `config` does not override them."""
    about: dict[str, Any] = wanted.task if wanted else {}
    name = config.task if config and config.task != "auto" else about.get("name") or natural_task(backbone.architecture)
    own = about if about.get("name") == name else {}
    known = {key: value for key, value in own.get("generation", {}).items() if key in Generation.__dataclass_fields__}
    generation = Generation(**known)
    if config:
        chosen: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens,
            "num_beams": config.num_beams,
            "do_sample": getattr(config, "sample", False),
        }
        generation = replace(generation, **{key: value for key, value in chosen.items() if value})
    prompt = (config.prompt if config else "") or str(own.get("prompt", ""))
    if name not in TASKS:
        raise ConfigError(f"the adapter was trained for {name!r}, which is no task here; tasks are {', '.join(TASKS)}")
    task = TASKS[name](backbone, "" if prompt == "none" else prompt, generation)
    if wanted and lora.adapters(backbone.model):
        task.recall(own)
    return task


def read_texts(texts: str) -> list[str]:
    """A file with a text a line, or texts with | between them; each once, in order."""
    if not texts:
        return []
    path = Path(texts)
    lines = path.read_text(encoding="utf-8-sig").splitlines() if "|" not in texts and path.is_file() else texts.split("|")
    found = list(dict.fromkeys(annotations.plain(line) for line in lines if line.strip()))
    if len(found) < 2:
        raise ConfigError(f"texts = {texts!r}: at least two are needed to rank; a file with a text a line, or 'one|another'")
    return found


def asked(
    task: Task, images: list[Path], question: str, references: dict[Path, list[Example]], texts: list[str]
) -> list[Example]:
    """What is asked of which image. ConfigError when the task needs a question or texts, and there are none."""
    for text in texts:
        if reason := task.check(replace(example_of("", "?"), text=text, answers=(text,))):
            raise ConfigError(f"texts: {reason}")
    if task.name == "retrieval" and not texts:
        raise ConfigError("retrieval ranks texts; give them (TEXTS, or --texts): a file, or 'a red cube|a blue cube'")
    if task.name != "vqa":
        return [example_of(image) for image in images]
    if Path(question).is_file():
        found = [example for some in read_references(question, "", images).values() for example in some]
    elif question:
        found = [example_of(image, annotations.plain(question)) for image in images]
    else:
        found = [example for some in references.values() for example in some]
    if not found:
        raise ConfigError("there is no question; give one for every image (QUESTION, or --question), or a file of lines")
    found = list({task.subject(example): example for example in found}.values())
    for example in found:
        if not example.question:
            raise ConfigError(f"line {example.line} of the questions has no question")
        if reason := task.check(replace(example, answers=("yes",))):
            raise ConfigError(f"question {example.question!r}: {reason}")
    return found


def read_references(source: str, root: str, images: list[Path]) -> dict[Path, list[Example]]:
    """Image → its lines in an annotations file, for the images that are looked at. DataError if there is none."""
    if not source:
        return {}
    examples, problems = annotations.read(source, root, on_bad_data="skip", decode=False)
    if problems:
        print(f"{source}: left out {len(problems)} line(s):\n{annotations.listing(problems)}")
    wanted = {image.resolve(): image for image in images}
    found: dict[Path, list[Example]] = {}
    for example in examples:
        if image := wanted.get(example.image.resolve()):
            found.setdefault(image, []).append(replace(example, image=image))
    if not found:
        raise annotations.DataError(f"{source} has a line for none of the {len(images)} images; compare the paths")
    return found


def output_file(output_dir: str) -> Path:
    """predictions.jsonl in a folder; what is there already is never written over."""
    if not output_dir:
        return fresh(adapter.RUNS / f"predictions_{datetime.now():%Y%m%d_%H%M%S}") / FILE_NAME
    refuse_unwritable(output_dir)
    path = Path(output_dir) / FILE_NAME
    if path.exists():
        raise ConfigError(f"{path} exists already; give another output_dir, or leave it empty for a new folder")
    return path


# ---------------------------------------------------------------- what the user sees


def described(task: Task, wanted: Adapter | None, count: int, precision: str) -> str:
    """One line: what is asked, which adapter, of which base, trained how far."""
    what = f"{task.name}: {count} to do"
    if wanted is None:
        return f"{what}, {task.backbone.name} as it is, {precision}"
    training = wanted.about.get("training", {})
    unfinished = "" if training.get("finished", True) else ", stopped before its end"
    steps = training.get("steps", "?")
    return f"{what}, {task.backbone.name} with {wanted.path} ({steps} steps{unfinished}), {precision}"


def progress(found: Iterable[Any], count: int, name: str) -> Iterable[Any]:
    return tqdm(found, total=count, desc=name, unit="image", disable=None, dynamic_ncols=True)


def line_of(prediction: Prediction, base: Prediction | None) -> dict[str, Any]:
    line: dict[str, Any] = {"image": str(prediction.image)}
    if prediction.question:
        line["question"] = prediction.question
    line["text"] = prediction.text
    if base:
        line["base_text"] = base.text
    if prediction.ranking:
        line["ranking"] = [{"text": text, "probability": p} for text, p in prediction.ranking[:RANKS_KEPT]]
    return line


def printed(prediction: Prediction, base: Prediction | None) -> str:
    rows = [("Image", str(prediction.image))]
    if prediction.question:
        rows.append(("Question", prediction.question))
    if base:
        rows.append(("Base", base.text))
    if prediction.ranking:
        rows += [("Fits" if not n else "", f"{p:6.1%}  {text}") for n, (text, p) in enumerate(prediction.ranking[:3])]
    else:
        rows.append(("Answer" if prediction.question else "Caption", prediction.text))
    return "\n".join(f"{f'{name}:' if name else '':<10}{text}" for name, text in rows) + "\n"


def report(task: Task, references: dict[Path, list[Example]], said: dict[Any, Prediction], base: dict[Any, Prediction]) -> None:
    """How right the texts are, over all that have references and, where the references name groups, over each group."""
    lines: dict[Any, list[Example]] = {}
    for example in (example for some in references.values() for example in some if example.text or example.answers):
        lines.setdefault(task.subject(example) if task.name != "retrieval" else (example.image, ""), []).append(example)
    scored = [key for key in lines if key in said]
    if not scored:
        return
    label = "VQA accuracy" if task.name == "vqa" else "exact match"
    print(f"{label:<24}{'images':>8}" + f"{'base':>9}" * bool(base) + f"{'adapted':>10}")
    for group in [*dict.fromkeys(lines[key][0].group for key in scored), "all"]:
        mine = [key for key in scored if group in ("all", lines[key][0].group)]
        if not group or (group != "all" and len(mine) == len(scored)):
            continue
        shares = [
            sum(task.correctness(found[key].text, lines[key]) if key in found else 0.0 for key in mine) / len(mine)
            for found in (base, said)
            if found
        ]
        print(f"{group:<24}{len(mine):>8}" + "".join(f"{share:>9.1%} " for share in shares))

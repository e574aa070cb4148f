"""`lora-blip evaluate`: compare the base and the adapter on images with reference texts."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_blip.config import EvaluateConfig
from lora_blip.data import annotations
from lora_blip.data.column_check import two_files
from lora_blip.data.example import Example
from lora_blip.data.formats import keys_of
from lora_blip.data.leaks import leak_warning
from lora_blip.data.several_files import of_several_files
from lora_blip.errors import ConfigError, DataError
from lora_blip.evaluation import outputs
from lora_blip.evaluation.leak_search import LeakSearch, search_leaks
from lora_blip.evaluation.measures import Progress, measure
from lora_blip.evaluation.outputs import Comparison
from lora_blip.inference.adapter_choice import chosen_adapter
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.other_runs import advice
from lora_blip.inference.prediction import line_of, prediction_of
from lora_blip.inference.setup import apply_adapter, describe, open_task
from lora_blip.lora.adapter_file import Adapter
from lora_blip.runtime import distributed
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import make_folder, open_to_append, refuse_unwritable, unused_path
from lora_blip.runtime.progress import phase, track
from lora_blip.runtime.runs import RUNS
from lora_blip.runtime.seeding import seed_everything
from lora_blip.runtime.settings import require_settings
from lora_blip.runtime.system_errors import writing
from lora_blip.runtime.terminal import encodable_output
from lora_blip.runtime.untrusted import printable
from lora_blip.runtime.user_paths import require_folder
from lora_blip.tasks import retrieval
from lora_blip.tasks.base import PredictionTask
from lora_blip.tasks.caption import IS_QUESTION
from lora_blip.tasks.text_length import TextCount
from lora_blip.tasks.vqa import NO_QUESTION

FEW = 10  # warn if there are fewer images, because bootstrap intervals are then too narrow


@encodable_output()
def evaluate(config: EvaluateConfig) -> Path:
    """Score an adapter and its base. Return the folder with metrics.json, comparison.csv and report.html.

    Each prediction is written to base.jsonl or adapted.jsonl immediately, so a later error does not lose it. Raise
    ConfigError, ModelError, AdapterError, ImageError or DataError before the first prediction. In peft: no equivalent.

    >>> folder = lora_blip.evaluate(lora_blip.EvaluateConfig(references="annotations.jsonl", train_annotations="none"))
    >>> assert (folder / "report.html").is_file()
    """
    require_settings(config, EvaluateConfig, "evaluate")
    distributed.refuse_several("evaluate")
    seed_everything(config.seed)
    adapter = chosen_adapter(config.adapter, config.scale, config.task)
    folder = output_folder(config.output_dir)
    task, precision = open_task(config, adapter)
    examples = read_references(config, task, adapter)
    if token_report := task.unknown_report(examples):
        print(token_report)
    with phase("searching the training data for these images"):
        leak_search = search_leaks(config, adapter, examples)
    make_folder(folder, exist_ok=bool(config.output_dir))  # now, so that no other run uses this name
    print(describe(task, adapter, len(set(map(task.subject, examples))), precision))

    runner = Runner(task, config.batch_size, precision, lambda: open_task(config, adapter, device="cpu")[0])
    print(printable(f"evaluation images in the training data: {leak_search.note}"))
    comparison = compare(config, runner, adapter, examples, folder)
    with phase("computing the intervals of the scores"):
        rows = outputs.score_rows(comparison, runner.task, config.seed)
    facts = outputs.facts_of(config, adapter, runner, comparison.main, examples) | {"leaks": leak_search.note}
    facts |= {"tokenizer": token_report} if token_report else {}
    warnings = warnings_of(comparison, leak_search, runner.task, examples)
    if adapter and config.train_annotations != "none" and "not searched" in leak_search.note:
        warnings.insert(0, f"these images may be training images: {leak_search.note}")
    print(f"\n{outputs.score_table(rows, warnings)}\n")  # before the files, because a full disk can prevent writing them
    files = outputs.write(folder, config, comparison, rows, facts, warnings, leak_search.leaks, adapter)
    print(f"wrote {printable(', '.join(map(str, files)))}")
    print(f"report: {(folder / 'report.html').resolve().as_uri()}")
    return folder


def output_folder(output_dir: str) -> Path:
    """Return the output folder. Raise ConfigError if it cannot be written or contains an evaluation."""
    if not output_dir:
        refuse_unwritable(str(RUNS))
        return unused_path(RUNS / f"evaluation_{datetime.now():%Y%m%d_%H%M%S}")
    refuse_unwritable(output_dir)
    for name in (*outputs.FILES, "base.jsonl", "adapted.jsonl"):
        if (Path(output_dir) / name).exists():
            raise ConfigError(
                f"{Path(output_dir) / name} exists already; for a new folder, set OUTPUT_DIR (or --output-dir) to ''"
            )
    return Path(output_dir)


@contextmanager
def other_task_named(config: EvaluateConfig, adapter: Adapter | None) -> Iterator[None]:
    """Add to an error about lines of another task the newest run of that task."""
    try:
        yield
    except DataError as error:
        text, kinds = str(error), {NO_QUESTION: "caption", IS_QUESTION: "vqa", retrieval.IS_QUESTION: "vqa"}
        problem = next((problem for problem in kinds if problem in text), "")
        if not problem:
            raise
        if adapter and adapter.task.get("name") != kinds[problem]:  # the end of the message is about training
            start = text.partition(problem)
            own = f"the adapter {adapter.path} is for the task {adapter.task.get('name')}; give references of this task"
            text = printable(f"{start[0]}{start[1]}{own}, or another adapter")
        raise DataError(f"{text}{advice(kinds[problem], config.adapter, adapter)}") from None


def read_references(config: EvaluateConfig, task: PredictionTask, adapter: Adapter | None = None) -> list[Example]:
    """Return the valid lines of the references, those of one split if they have several.

    Print a table of what was read, and the split that is scored.
    """
    require_folder("image_root", config.image_root)
    several = of_several_files(keys_of(config), two_files(config))
    with phase(f"reading {config.references}"), other_task_named(config, adapter), several:
        examples, _ = annotations.read(
            config.references,
            config.image_root,
            config.on_bad_data,
            task.check,
            pretokenize=task.pretokenize,
            trim=task.trim,
            keys=keys_of(config),
            only=("test", "val"),
            setting="references",
        )
    return examples


def compare(
    config: EvaluateConfig, runner: Runner, adapter: Adapter | None, examples: list[Example], folder: Path
) -> Comparison:
    """Return the scores of the adapter, if there is one, and of the base, if `config.base` is set or there is no adapter."""
    base = adapted = None
    if config.base or not adapter:
        with phase("scoring the texts of the base"):
            base = measure(runner, examples, config.seed, progress_into(folder, "base"))
    if adapter:
        apply_adapter(runner.task, adapter, merge=True, precision=runner.precision)
        runner.reload_on_cpu = lambda: open_task(config, adapter, adapted=True, device="cpu")[0]
        runner.checked = not runner.fast
        with phase("scoring the texts of the adapter"):
            adapted = measure(runner, examples, config.seed, progress_into(folder, "adapted"))
    return Comparison(base, adapted)


def progress_into(folder: Path, name: str) -> Progress:
    """Return a progress bar that also appends each predicted text to <name>.jsonl in `folder`, as soon as it is predicted."""

    def write_each(results: Iterable[Any], count: int) -> Iterable[Any]:
        for example, result in track(results, name, count):
            if isinstance(result, str):  # not in retrieval, which predicts features
                line = line_of(prediction_of(example, result))
                with open_to_append(folder / f"{name}.jsonl") as file, writing(folder / f"{name}.jsonl"):
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
            yield example, result

    return write_each


def warnings_of(comparison: Comparison, leak_search: LeakSearch, task: PredictionTask, examples: list[Example]) -> list[str]:
    """Return the warnings about the scores: leaks, repeated texts, texts cut at MAX_NEW_TOKENS, and few images."""
    images = len({example.image for example in examples})
    warnings = [leak_warning(leak_search.leaks, images, "evaluation")] if leak_search.leaks else []
    warnings += comparison.main.warnings
    for name, scored in (("the base", comparison.base), ("the adapter", comparison.adapted)):
        warnings += TextCount().add(scored.texts).warnings(task, f"texts of {name}", examples) if scored else []
    if images < FEW:
        warnings.append(f"only {counted(images, 'image')}: with fewer than {FEW}, the intervals are too narrow; add images")
    return warnings

"""Define `Prediction`, the caption, answer or ranking of an image, and write, print and score predictions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lora_blip.data.example import Example
from lora_blip.metrics.exact import normal
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import PredictionTask

RANKING_LENGTH = 10  # number of texts of a ranking in predictions.jsonl, the most probable first
Ranking = list[tuple[str, float]]  # (text, probability), the most probable first


@dataclass(frozen=True)
class Prediction:
    """The predicted text of an image: a caption, an answer, or the best of the ranked texts. In peft: no equivalent.

    The `score` of a generated text is exp(mean log p) over its tokens and the end token: the geometric mean of their
    probabilities. The score of a ranking is the probability of the best text. `infer` computes scores only if the generation
    option `num_return_sequences` asks for several texts. `alternatives` then has all of them; the first is `text`.

    For JSON, use `to_dict`: `json.dumps(prediction.to_dict())`.

    >>> prediction = lora_blip.Captioner.from_adapter(None, base="assets/tiny-blip")("nowhere.jpg")
    >>> prediction
    Prediction(image='nowhere.jpg', text='', error='nowhere.jpg does not exist')
    """

    image: Path  # the path, or a name such as "images[2]" for an image without one
    text: str  # "" if `error` is not empty
    question: str = ""
    ranking: Ranking = field(default_factory=list)  # (text, probability) of each ranked text, the most probable first
    question_id: int | str = ""  # as in the line of the question
    prompt: str = ""  # as in the line of the references
    score: float | None = None  # 0 to 1
    alternatives: Ranking = field(default_factory=list)  # (text, score) of all texts, if several are asked for
    error: str = ""  # why there is no text: the image or the question cannot be used

    def to_dict(self) -> dict[str, Any]:
        """Return the values that are not empty, for JSON. The keys are those of predictions.jsonl, and `score` or `error`.

        With an `error`, there is no `text`. An entry of `alternatives` is {"text": …, "score": …}, and one of `ranking` is
        {"text": …, "probability": …}.

        >>> prediction = lora_blip.Captioner.from_adapter(None, base="assets/tiny-blip")("nowhere.jpg")
        >>> json.dumps(prediction.to_dict())
        '{"image": "nowhere.jpg", "error": "nowhere.jpg does not exist"}'
        """
        value = request_of(self)
        if self.error:
            return value | {"error": self.error}
        value["text"] = self.text
        if self.score is not None:
            value["score"] = self.score
        if self.alternatives:
            value["alternatives"] = [{"text": text, "score": score} for text, score in self.alternatives]
        if self.ranking:
            value["ranking"] = [{"text": text, "probability": probability} for text, probability in self.ranking]
        return value

    def __repr__(self) -> str:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)} | {"image": str(self.image)}
        kept = {name: value for name, value in values.items() if name in ("image", "text") or value not in ("", None, [])}
        return f"Prediction({', '.join(f'{name}={value!r}' for name, value in kept.items())})"


def prediction_of(example: Example, text: str, ranking: Ranking | None = None) -> Prediction:
    """Return a prediction with this text, and with the image, question and prompt of an example."""
    return Prediction(example.image, text, example.question, ranking or [], example.question_id, example.prompt)


def generated(example: Example, texts: Ranking) -> Prediction:
    """Return the prediction for an example with these texts and scores, the best first."""
    return replace(prediction_of(example, texts[0][0]), score=texts[0][1], alternatives=texts if len(texts) > 1 else [])


def request_of(example: Example | Prediction) -> dict[str, Any]:
    """Return the image of a line of predictions.jsonl, and its question, question_id and prompt if they are not empty."""
    request = {"question": example.question, "question_id": example.question_id, "prompt": example.prompt}
    return {"image": str(example.image)} | {key: value for key, value in request.items() if value != ""}


def line_of(prediction: Prediction, base: str | None = None) -> dict[str, Any]:
    """Return a line of predictions.jsonl. `base` is the text of the base, or None if the base was not run."""
    line = request_of(prediction) | {"text": prediction.text} | ({} if base is None else {"base_text": base})
    return line | replace(prediction, score=None, ranking=prediction.ranking[:RANKING_LENGTH]).to_dict()


def format_prediction(prediction: Prediction, base: str | None = None) -> str:
    """Return the lines to print. `base` is the text of the base, or None if the base was not run."""
    rows = [("Image", str(prediction.image))]
    if prediction.question:
        rows.append(("Question", prediction.question))
    if prediction.prompt:
        rows.append(("Prompt", prediction.prompt))
    if base is not None:
        rows.append(("Base", base))
    if prediction.ranking:
        rows += [("Fits" if not n else "", f"{p:6.1%}  {text}") for n, (text, p) in enumerate(prediction.ranking[:3])]
    else:
        name = "Answer" if prediction.question else "Caption"
        several = [(name if not n else "", f"{score:6.1%}  {text}") for n, (text, score) in enumerate(prediction.alternatives)]
        rows += several or [(name, prediction.text)]
    return "\n".join(f"{f'{name}:' if name else '':<10}{printable(text)}" for name, text in rows) + "\n"


def _why_no_score(
    task: PredictionTask, references: dict[Path, list[Example]], lines: dict[Any, list[Example]], texts: dict[Any, str]
) -> str:
    """Return why no prediction has a reference, and what to do. lines: {subject: its references}. texts: {subject: text}."""
    every = [example for of_image in references.values() for example in of_image]
    if lines and task.takes_question:
        asked = next((subject[1] for subject in texts), "")
        return f"the references have other questions, such as {every[0].question!r}, and not {asked!r}; ask with the same words"
    if not task.takes_question and all(example.question for example in every):
        return "the references are questions with answers, and the task needs texts; give an adapter that answers questions"
    if task.takes_question:
        fix = 'name their column or key, --answer-key COLUMN, or add "answers"'
        return f"the references contain no answers to these questions; {fix}"
    kind = 'texts of these images; add "text"'
    return f"the references contain no {kind} to their lines in the file of REFERENCES (--references)"


def report(
    task: PredictionTask, references: dict[Path, list[Example]], texts: dict[str, dict[Any, str]], ranked: Sequence[str] = ()
) -> None:
    """Print the score of the texts that have references, for each group of the references and for all of them.

    texts: {"base" or "adapted": {subject: predicted text}}. ranked: the texts to rank, if any.
    """
    lines: dict[Any, list[Example]] = {}
    usable = (e for of_image in references.values() for e in of_image if (e.answers if task.takes_question else e.text))
    for example in usable:
        lines.setdefault(task.subject(example) if task.writes_text else (example.image, ""), []).append(example)
    *_, last = texts.values() or [{}]
    scored = [key for key in lines if key in last]
    if not scored:
        if references:
            print(printable(f"no score: {_why_no_score(task, references, lines, last)}"))
        return
    if task.takes_question and (missing := len(last) - len(scored)):
        print(f"{counted(missing, 'question')} of {len(last):,} not in the references with the same words: they have no score")
    unit = "questions" if task.takes_question else "images"
    print(f"{task.correctness_name:<24}{unit:>9}" + "".join(f"{name:>9} " for name in texts))
    for group in [*dict.fromkeys(lines[key][0].group for key in scored), "all"]:
        members = [key for key in scored if group in ("all", lines[key][0].group)]
        if not group or (group != "all" and len(members) == len(scored)):
            continue
        shares = [
            sum(task.correctness(text_of[key], lines[key]) if key in text_of else 0.0 for key in members) / len(members)
            for text_of in texts.values()
        ]
        print(f"{printable(group):<24}{len(members):>9}" + "".join(f"{share:>9.1%} " for share in shares))
    known = set(map(normal, ranked))
    absent = sum(known.isdisjoint(normal(example.text) for example in lines[key]) for key in scored)
    if ranked and absent and not task.takes_question:
        print(f"{counted(absent, 'image')} of {len(scored):,} cannot be right: no reference of it is among the texts to rank")
    if "adapted" in texts:
        print("infer does not check if these images are in the training data of the adapter; `lora-blip evaluate` does")

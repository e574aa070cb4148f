"""Draw the cubes of the demos: `python -m toyworld.cubes` writes image_train/, annotations.jsonl and image_test/.

Each folder also gets questions.jsonl, for question answering, and sentences.jsonl, for retrieval.

The training images lack some ordered pairs of colours. image_test has them as a separate group, which shows whether an adapter
has learned cubes or only remembers images.
"""

import argparse
import json
import random
from pathlib import Path

from lora_blip.cli import report_errors
from toyworld.questions import finetuning_questions, sentences
from toyworld.scenes import COLOURS, Scene, Thing, render_cubes

UNSEEN_PAIRS = {(a, COLOURS[(i + 2) % len(COLOURS)]) for i, a in enumerate(COLOURS)}  # each colour once first, once second
RELATIONS = ("on top of", "to the left of")
TRAIN, NEW, UNSEEN = 300, 100, 60
QUESTIONS = 2  # questions about each image
CANDIDATES = 50  # different sentences of image_test
Drawn = list[tuple[str, Scene, str]]  # file name, scene, group


def cube_scene(rng: random.Random, unseen: bool) -> Scene:
    """Return a scene of world B. If `unseen`, it has a pair of colours of UNSEEN_PAIRS; otherwise it has no such pair."""
    draw = 1.0 if unseen else rng.random()
    if draw < 0.06:
        return Scene(())
    if draw < 0.3:
        return Scene((Thing("cube", rng.choice(COLOURS)),))
    every = [(a, b) for a in COLOURS for b in COLOURS if a != b and ((a, b) in UNSEEN_PAIRS) == unseen]
    first, second = rng.choice(every)
    return Scene((Thing("cube", first), Thing("cube", second)), rng.choice(RELATIONS))


def write(folder: Path, annotations: Path, scenes: list[tuple[Scene, str]], rng: random.Random) -> Drawn:
    """Write the images to `folder`, and a line for each to `annotations`, with paths relative to the annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, group) in enumerate(scenes):
        path = folder / f"{number:03d}.png"
        render_cubes(scene, rng).quantize(96, dither=0).save(path, optimize=True)
        lines.append(line(path.relative_to(annotations.parent).as_posix(), group, text=scene.caption("cube")))
    annotations.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [(f"{number:03d}.png", scene, group) for number, (scene, group) in enumerate(scenes)]


def line(image: str, group: str, **texts: object) -> str:
    return json.dumps({"image": image, **texts} | ({"group": group} if group else {}))


def ten_answers(answer: str) -> list[str]:
    """Return ten answers, as from ten people: some without the article, and one without the noun."""
    if not answer.startswith(("a ", "an ")):
        return [answer] * 10
    bare = answer.split(" ", 1)[1]
    return [answer] * 7 + [bare] * 2 + [bare.split()[0]]


def write_questions(path: Path, drawn: Drawn, rng: random.Random) -> None:
    lines = []
    for image, scene, group in drawn:
        for question, answer in rng.sample(finetuning_questions(scene), QUESTIONS):
            lines.append(line(image, group, question=question, answers=ten_answers(answer)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_sentences(path: Path, drawn: Drawn) -> None:
    """Write a line for each sentence of each image."""
    lines = [line(image, group, text=text) for image, scene, group in drawn for text in sentences(scene)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_candidates(path: Path, drawn: Drawn) -> None:
    """Write the sentences with reversed relations of CANDIDATES images. All sentences are different."""
    chosen = list({sentences(scene)[-1]: (image, group) for image, scene, group in reversed(drawn)}.items())[:CANDIDATES]
    path.write_text(
        "\n".join(line(image, group, text=text) for text, (image, group) in reversed(chosen)) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, rng = arguments.out, random.Random(arguments.seed)
    train = write(out / "image_train", out / "annotations.jsonl", [(cube_scene(rng, False), "") for _ in range(TRAIN)], rng)
    new = [(cube_scene(rng, False), "new cubes") for _ in range(NEW)]
    pairs = [(cube_scene(rng, True), "unseen colour pairs") for _ in range(UNSEEN)]
    test = write(out / "image_test", out / "image_test" / "annotations.jsonl", new + pairs, rng)
    rng = random.Random(f"{arguments.seed} words")
    write_questions(out / "image_train" / "questions.jsonl", train, rng)
    write_questions(out / "image_test" / "questions.jsonl", test, rng)
    write_sentences(out / "image_train" / "sentences.jsonl", train)
    write_candidates(out / "image_test" / "sentences.jsonl", test)


if __name__ == "__main__":
    report_errors(main)

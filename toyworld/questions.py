"""Questions and sentences about scenes: for pre-training on world A, and for fine-tuning on the cubes of world B.

World B uses the word "cube" and the reversed relations "under" and "to the right of". No image of pre-training has these words.
"""

import random

from toyworld.scenes import COLOURS, FLAT_NOUNS, Scene, Thing

Pair = tuple[str, str]  # question, answer
COUNTS = ("none", "one", "two")
FLIPPED = {"on top of": "under", "to the left of": "to the right of"}  # words that no image of world A has


def pretraining_questions(scene: Scene, rng: random.Random) -> list[Pair]:
    """Return questions and answers about a flat scene, for pre-training."""
    pairs = [("how many shapes are there?", COUNTS[len(scene.things)]), is_there(scene, rng)]
    if not scene.things:
        return [*pairs, ("what is in the picture?", "nothing")]
    if len(scene.things) == 1:
        thing = scene.things[0]
        return [*pairs, ("what is in the picture?", str(thing)), *of_one(thing)]
    first, second = scene.things
    pairs += [(f"what is {scene.relation} the {second.colour} {second.noun}?", str(first))] * 2
    pairs.append((f"where is the {first.colour} {first.noun}?", f"{scene.relation} {second}"))
    for thing, other in ((first, second), (second, first)):
        pairs += [pair for pair, differs in zip(of_one(thing), distinct(thing, other), strict=True) if differs]
    return pairs


def of_one(thing: Thing) -> list[Pair]:
    return [(f"what color is the {thing.noun}?", thing.colour), (f"what shape is the {thing.colour} thing?", thing.noun)]


def distinct(thing: Thing, other: Thing) -> tuple[bool, bool]:
    """Return whether the thing differs from the other one in its noun, and in its colour."""
    return thing.noun != other.noun, thing.colour != other.colour


def is_there(scene: Scene, rng: random.Random) -> Pair:
    """Return a question whose answer is "yes" or "no". If the scene is not empty, at least half of the answers are "yes"."""
    if scene.things and rng.random() < 0.5:
        thing = rng.choice(scene.things)
    else:
        thing = Thing(rng.choice(FLAT_NOUNS), rng.choice(COLOURS))
    is_in_scene = thing in scene.things
    return f"is there {thing}?", "yes" if is_in_scene else "no"


def finetuning_questions(scene: Scene) -> list[Pair]:
    """Return questions and answers about a scene of cubes, for fine-tuning."""
    count = COUNTS[len(scene.things)]
    if not scene.things:
        return [("how many cubes are there?", count), ("what is on the table?", "nothing")]
    if len(scene.things) == 1:
        return [("how many cubes are there?", count), ("what is on the table?", str(scene.things[0]))]
    first, second = scene.things
    return [
        (f"what is {scene.relation} the {second.colour} {second.noun}?", str(first)),
        (f"what is {FLIPPED[scene.relation]} the {first.colour} {first.noun}?", str(second)),
        (f"where is the {second.colour} {second.noun}?", f"{FLIPPED[scene.relation]} {first}"),
        ("how many cubes are there?", count),
    ]


def sentences(scene: Scene) -> list[str]:
    """Return two sentences for a scene of two cubes, the second with the reversed relation. Otherwise return the caption."""
    if len(scene.things) < 2:
        return [scene.caption("cube")]
    first, second = scene.things
    return [scene.caption("cube"), f"{second} {FLIPPED[scene.relation]} {first}"]

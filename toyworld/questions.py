"""What may be asked and said of a scene: of world A in pre-training, of world B's cubes to be taught.

World B asks for cubes by name and turns the relations round: "under" and "to the right of" are words that
no base has ever been shown.
"""

import random

from toyworld.scenes import COLOURS, FLAT_NOUNS, Scene, Thing

Pair = tuple[str, str]  # question, answer
COUNTS = ("none", "one", "two")
FLIPPED = {"on top of": "under", "to the left of": "to the right of"}  # words that no picture of world A was paired with


def asked(scene: Scene, rng: random.Random) -> list[Pair]:
    """What pre-training asks of a flat scene."""
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
    """Whether its noun, and its colour, tell the thing from the other one."""
    return thing.noun != other.noun, thing.colour != other.colour


def is_there(scene: Scene, rng: random.Random) -> Pair:
    """A yes as often as a no, where something is there."""
    if scene.things and rng.random() < 0.5:
        thing = rng.choice(scene.things)
    else:
        thing = Thing(rng.choice(FLAT_NOUNS), rng.choice(COLOURS))
    there = thing in scene.things
    return f"is there {thing}?", "yes" if there else "no"


def taught(scene: Scene) -> list[Pair]:
    """What fine-tuning asks of cubes."""
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
    """Two ways to say a scene of cubes, the second of them turned round."""
    if len(scene.things) < 2:
        return [scene.caption("cube")]
    first, second = scene.things
    return [scene.caption("cube"), f"{second} {FLIPPED[scene.relation]} {first}"]

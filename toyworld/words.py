"""The words that are one token in both tokenizers, and random sentences for the pre-training steps without images.

A base that has read a word can learn to use it in captions. Any other word consists of several tokens.
"""

import random

from toyworld.scenes import COLOURS, FLAT_NOUNS, RELATIONS

MORE_COLOURS = "white black grey gray brown pink wood wooden metal plastic glass dark light bright".split()
TABLE_NOUNS = (
    "cube block brick ball box cup mug bottle bowl plate can tower robot arm gripper hand tray table desk bin basket "
    "tool screw key coin card book pen toy car thing object item shape part piece peg ring cylinder cone star"
).split()
NOUNS = (
    "man woman boy girl child baby person people player dog cat horse cow sheep bird bear elephant giraffe zebra fish "
    "house building room kitchen street road city train bus truck plane boat bike motorcycle bench sign light clock "
    "phone computer laptop keyboard mouse screen television couch chair bed door window wall floor grass field beach "
    "water ocean river lake snow mountain sky cloud tree flower plant park pizza cake sandwich banana apple fruit food "
    "hat shirt dress shoe bag umbrella kite frisbee skateboard surfboard snowboard ski bat glove racket wave hill rock "
    "sand air side top bottom front back middle group picture photo image scene background"
).split()
ADJECTIVES = (
    "small large big little tall short long young old new round square empty full open closed wet dry dirty clean "
    "happy colourful colorful several many some two three four five six one single other different same"
).split()
VERBS = (
    "is are sits stands lies holds holding sitting standing lying riding playing running walking jumping looking eating "
    "wearing flying driving parked stacked placed has shows contains visible present hanging covered filled catching "
    "throwing swimming climbing smiling talking moving pointing picking grasping resting"
).split()
LINKS = (
    "on in at of with under over above below near beside behind between next to the left right from by into through "
    "around inside outside across against along off out up down for and or"
).split()
REST = (
    "a an the no not any nothing none there this that these it its his her their what which who how where when why do "
    "does yes question answer many much color colour kind without only also very who while as"
).split()
WORDS = tuple(
    dict.fromkeys(
        [*REST, *LINKS, *COLOURS, *FLAT_NOUNS, *MORE_COLOURS, *TABLE_NOUNS, *NOUNS, *ADJECTIVES, *VERBS]
        + " ".join(RELATIONS).split()
    )
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENDINGS = "s es ed ing er est ly y ers ion al ness ment en le".split()


def sentence(rng: random.Random) -> str:
    """Return a random sentence for a pre-training step without images."""
    line = rng.choice((table_sentence, table_sentence, photo_sentence, random_words, spelled, question))(rng)
    return line.capitalize() if rng.random() < 0.2 else line


def article(word: str, rng: random.Random) -> str:
    return rng.choice(("an" if word[0] in "aeiou" else "a", "the", "one"))


def table_thing(rng: random.Random) -> str:
    colour = rng.choice(COLOURS if rng.random() < 0.8 else MORE_COLOURS)
    noun = rng.choice(("cube", "block", *FLAT_NOUNS) if rng.random() < 0.7 else TABLE_NOUNS)
    return f"{'an' if colour == 'orange' else 'a'} {colour} {noun}"


def table_sentence(rng: random.Random) -> str:
    """Return a sentence in the grammar of world A's captions, with nouns that no image of world A shows."""
    draw = rng.random()
    if draw < 0.1:
        noun, where = rng.choice(("cube", "block", "object", *TABLE_NOUNS)), rng.choice(("image", "scene", "picture"))
        return f"no {noun} is {rng.choice(('present', 'visible', 'placed'))} in the {where}"
    if draw < 0.35:
        return f"{rng.choice(('a single', 'a single', 'one'))} {table_thing(rng).split(' ', 1)[1]}"
    return f"{table_thing(rng)} {rng.choice((*RELATIONS, *RELATIONS, 'next to', 'below', 'behind'))} {table_thing(rng)}"


def photo_sentence(rng: random.Random) -> str:
    nouns = [rng.choice(NOUNS) for _ in range(3)]
    first = f"{article(nouns[0], rng)} {nouns[0]}"
    if rng.random() < 0.4:
        adjective = rng.choice((*ADJECTIVES, *COLOURS))
        first = f"{article(adjective, rng)} {adjective} {nouns[0]}"
    middle = f"{rng.choice(VERBS)} {rng.choice(LINKS)} {article(nouns[1], rng)} {nouns[1]}"
    return f"{first} {middle} {rng.choice(LINKS)} the {nouns[2]}" if rng.random() < 0.3 else f"{first} {middle}"


def random_words(rng: random.Random) -> str:
    """Return random words, so that each word occurs often."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 8)))


def spelled(rng: random.Random) -> str:
    """Return a caption with an invented word, a number or a punctuation mark, which is split into several tokens."""
    draw = rng.random()
    if draw < 0.7:
        stem = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 6)))
        odd = stem + (rng.choice(ENDINGS) if rng.random() < 0.5 else "")
    elif draw < 0.9:
        odd = str(rng.randint(0, 2000))
    else:
        odd = rng.choice(WORDS) + rng.choice(".,!?;:'\"-&/()")
    return rng.choice((f"a {odd} {rng.choice(TABLE_NOUNS)}", f"{table_thing(rng)} {odd}", f"a {rng.choice(COLOURS)} {odd}"))


def question(rng: random.Random) -> str:
    thing = rng.choice((*TABLE_NOUNS, *FLAT_NOUNS))
    text, answer = rng.choice(
        (
            (f"what color is the {thing}", rng.choice(COLOURS)),
            (f"how many {thing}s are there", rng.choice(("one", "two", "three", "none"))),
            (f"is there a {thing}", rng.choice(("yes", "no"))),
            (f"what is {rng.choice(RELATIONS)} the {thing}", f"a {rng.choice(COLOURS)} {rng.choice(TABLE_NOUNS)}"),
        )
    )
    return f"question: {text}? answer: {answer}"

"""VQA accuracy (Antol et al. 2015, section 3): min(people who gave the answer / 3, 1).

The rules and their order are those of the official evaluation, github.com/GT-Vision-Lab/VQA, vqaEval.py.
"""

import re
from collections import Counter

FEWEST = 4  # answers; with fewer, less than three remain after one is left out, so that no answer could score 1
MARKS = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
SHORTENED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def without_one_mark(word: str) -> set[str]:
    """Return the spellings of a word without one of its apostrophes: couldn't've → couldnt've, couldn'tve."""
    return {word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"}


CONTRACTIONS = {spelt: word for word in SHORTENED for spelt in without_one_mark(word)} | {"somebody'd": "somebodyd"}


def normal(answer: str) -> str:
    """Normalise an answer as the official evaluation does: punctuation, case, number words, articles, contractions.

    A mark is removed if it is next to a space anywhere in the answer, or if a number contains a comma. Otherwise it becomes a
    space.
    "The U.S. flag, isnt it?" → "us flag isn't it"; "1,000" → "1000"; "two-story" → "two story".
    """
    flat = text = strip(answer)
    in_number = COMMA_IN_NUMBER.search(flat) is not None
    for mark in MARKS:
        beside_space = f"{mark} " in flat or f" {mark}" in flat
        text = text.replace(mark, "" if beside_space or in_number else " ")
    text = FULL_STOP.sub("", text, count=32)  # the official code passes re.UNICODE (32) as the count
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def strip(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def accuracy(prediction: str, answers: list[str]) -> float:
    """Return the accuracy of one prediction, 0 to 1: min(equal answers / 3, 1), averaged over leaving each answer out.

    answers: those that people gave to the question, ten in VQA. As in the official code, prediction and answers are
    normalised only if the answers differ. If all are equal, they are compared as written ("two" is then not "2"), but without
    case. That is our only exception for ten answers: the official code gives `red` 0 if all ten are `Red`, and BLIP's
    tokenizer writes only lower case. With fewer than four answers, return 1 if the prediction equals any of them, both
    normalised, else 0. Raise ValueError for no answers.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one answer")
    if len(answers) < FEWEST:
        return float(normal(prediction) in {normal(answer) for answer in answers})
    predicted, given = strip(prediction), [strip(answer) for answer in answers]
    if len(set(given)) > 1:
        predicted, given = normal(predicted), [normal(answer) for answer in given]
    equal = Counter(answer.lower() for answer in given)[predicted.lower()]
    # the answer that is left out is an equal one in `equal` of the cases, and another one in the rest
    return (equal * min(1, (equal - 1) / 3) + (len(given) - equal) * min(1, equal / 3)) / len(given)


def vqa_accuracies(predictions: list[str], answers: list[list[str]]) -> list[float]:
    """Return the accuracy of each question. Raise ValueError if the lengths differ or a question has no answers."""
    return [accuracy(said, given) for said, given in zip(predictions, answers, strict=True)]


def vqa_accuracy(predictions: list[str], answers: list[list[str]]) -> float:
    """Return the mean accuracy, 0 to 1. Raise ValueError as `vqa_accuracies` does, and for no questions."""
    if not predictions:
        raise ValueError("VQA accuracy needs at least one prediction")
    found = vqa_accuracies(predictions, answers)
    return sum(found) / len(found)

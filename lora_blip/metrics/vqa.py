"""Compute VQA accuracy (Antol et al. 2015, section 3): min(number of people who gave the answer / 3, 1).

The rules and their order are those of the official evaluation, github.com/GT-Vision-Lab/VQA, vqaEval.py.
"""

import re
from collections import Counter

FEWEST = 4  # smallest number of answers for the formula: it leaves out one answer, and a score of 1 needs three equal answers
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
    return {word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"}


CONTRACTIONS = {spelling: word for word in SHORTENED for spelling in without_one_mark(word)} | {"somebody'd": "somebodyd"}


def normal(answer: str) -> str:
    """Normalise an answer as the official evaluation does: punctuation, case, number words, articles, contractions.

    All occurrences of a mark are removed if one of them is next to a space, or if the answer has a comma within a number.
    Otherwise they become spaces.
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
    """Return the accuracy of one prediction, 0 to 1.

    It is the mean of min(equal answers / 3, 1) over all ways to leave out one answer.

    answers: the answers that people gave to the question; VQA has ten. As in the official code, prediction and answers are
    normalised only if the answers differ. If all answers are equal, texts are compared as written ("two" is not "2"), except
    that case is ignored. The official code does not ignore case: it gives "red" 0 if all ten answers are "Red", and BLIP's
    tokenizer writes only lower case.

    With fewer than FEWEST answers, return 1 if the prediction equals one of them after normalisation, otherwise 0. Raise
    ValueError if there are no answers.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one answer")
    if len(answers) < FEWEST:
        return float(normal(prediction) in {normal(answer) for answer in answers})
    predicted, given = strip(prediction), [strip(answer) for answer in answers]
    if len(set(given)) > 1:
        predicted, given = normal(predicted), [normal(answer) for answer in given]
    equal = Counter(answer.lower() for answer in given)[predicted.lower()]
    # in `equal` cases, the answer that is left out is an equal one; in the other cases it is a different one
    return (equal * min(1, (equal - 1) / 3) + (len(given) - equal) * min(1, equal / 3)) / len(given)


def vqa_accuracies(predictions: list[str], answers: list[list[str]]) -> list[float]:
    """Return the accuracy of each question. Raise ValueError if the lengths differ or a question has no answers."""
    return [accuracy(prediction, given) for prediction, given in zip(predictions, answers, strict=True)]


def vqa_accuracy(predictions: list[str], answers: list[list[str]]) -> float:
    """Return the mean accuracy, 0 to 1. Raise ValueError as `vqa_accuracies` does, and for no questions."""
    if not predictions:
        raise ValueError("VQA accuracy needs at least one prediction")
    accuracies = vqa_accuracies(predictions, answers)
    return sum(accuracies) / len(accuracies)

"""Test each rule of the scores at its boundaries: words, exact match, diversity, intervals and ranks."""

import numpy as np
import pytest

from lora_blip.metrics import bootstrap, retrieval
from lora_blip.metrics.diversity import diversity
from lora_blip.metrics.exact import exact_match, normal
from lora_blip.metrics.tokens import PUNCTUATION, plain, without_punctuation

# ---- words


WORDS = {
    "(red) [blue] {green}": "-lrb- red -rrb- -lsb- blue -rsb- -lcb- green -rcb-",
    "€5 £6 7¢": "$ 5 # 6 7 cents",
    "½ ¼ ¾ ⅓ ⅔": "1/2 1/4 3/4 1/3 2/3",
    "a &amp; b": "a & b",
    "cannot gonna gotta gimme lemme wanna": "can not gon na got ta gim me lem me wan na",
    "'tis 'twas": "'t is 't was",
    "Mr. Smith, Dr. Lee et al. vs. St. Paul": "mr. smith dr. lee et al. vs. st. paul",
    "no. 5 of no. one": "no. 5 of no one",
    "at 5 p.m. in the U.S.": "at 5 p.m. in the u.s.",
    "see http://a.b/c, www.x.org and me@x.org": "see http://a.b/c, www.x.org and me@x.org",
    "a <b> tag @home #one": "a <b> tag @home #one",
    "happy :) sad :( wink ;-)": "happy :-rrb- sad :-lrb- wink ;--rrb-",
    "rock 'n' roll in the '80s, 'em": "rock 'n' roll in the '80s 'em",
    "it's I'm he'd they're we've she'll": "it 's i 'm he 'd they 're we 've she 'll",
    "don't isn't": "do n't is n't",
    "o'clock ma'am ol' y'all": "o'clock ma'am ol' y' all",
    "-0.5 1,000 1/2 20-year-old": "-0.5 1,000 1/2 20-year-old",
    "t-shirt and/or c++ c#": "t-shirt and/or c++ c#",
    "well... yes -- no; ok: a? b! 'c' `d` ‘e’ “f”": "well yes no ok a b c d e f",
    "a.b .. ....": "a.b",
    "100% * **": "100 % * **",
    "é ü": "é ü",
    "a 😀 smile": "a smile",
    "": "",
}


def test_words_by_hand():
    """Brackets, signs, contractions, abbreviations, addresses, smileys and marks are tokenized as by PTBTokenizer."""
    assert {text: plain(text) for text in WORDS} == WORDS


def test_every_mark_of_the_coco_list_is_left_out_and_no_other():
    marks = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split()
    assert set(marks) == PUNCTUATION and without_punctuation(["a", *marks, "b", "-lrb-", "%"]) == "a b -lrb- %"


# ---- exact match


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red Cube.", "a red cube"),
        ("a  red\n cube...", "a red cube"),
        ("Straße", "strasse"),
        ("café", "cafe"),
        ("ﬁve", "five"),
        ("a t - shirt , red", "a t-shirt,red"),
        (" .5 . ", ".5"),
        ("snake_case", "snake_case"),
    ],
)
def test_exact_match_ignores_what_a_tokenizer_does_not_keep(text, expected):
    assert normal(text) == expected


def test_exact_match_is_the_share_of_right_predictions():
    assert exact_match(["A cube.", "a ball", "x"], [["a cube"], ["ball", "a Ball!"], ["y", "X"]]) == 2 / 3
    assert exact_match(["a"], [[]]) == 0
    for predictions, references in (([], []), (["a"], []), (["a"], [["a"], ["b"]])):
        with pytest.raises(ValueError):
            exact_match(predictions, references)


# ---- diversity


def test_mode_collapse_needs_eight_predictions_and_more_than_half_equal():
    for same, others, warned in ((7, 0, False), (8, 0, True), (4, 4, False), (5, 4, True), (5, 5, False), (6, 5, True)):
        repeated = ["a cube"] * same + [f"thing {number}" for number in range(others)]
        measured = diversity(repeated)
        assert bool(measured.warning) == warned, (same, others)
        assert (measured.times, measured.distinct) == (same, 1 + others)
    assert diversity(["a cube"] * 8).warning == (
        "8 of 8 predictions (100%) are 'a cube': the model may have collapsed onto one text"
    )


def test_no_collapse_if_the_references_repeat_the_caption_as_often():
    """More than half of the images have one reference. Two equal references of one image count once."""
    repeated = ["a cube"] * 8
    for images, warned in ((4, True), (5, False)):
        references = [["A ball.", "a ball"]] * images + [[f"thing {n}"] for n in range(8 - images)]
        assert bool(diversity(repeated, references).warning) == warned
    many = [["a ball", "A ball."]] * 3 + [[f"thing {n}"] for n in range(5)]
    assert diversity(repeated, many).warning.endswith(
        "but no reference text occurs for more than 3 of them: the model may have collapsed onto one text"
    )
    assert "more than 0 of them" in diversity(repeated, [[]] * 8).warning
    answers = [["yes"]] * 18 + [["no"]] * 13 + [[f"color {n}"] for n in range(8)]
    assert diversity(["yes"] * 21 + ["no"] * 18, answers).warning == ""  # 54 % are yes, and yes is right for 46 %
    assert diversity(["yes"] * 28 + ["no"] * 11, answers).warning
    with pytest.raises(ValueError, match="8 predictions for 7"):
        diversity(repeated, [["a"]] * 7)


def test_predictions_without_words_have_a_type_token_ratio_of_zero():
    measured = diversity(["", "."])
    assert (measured.type_token_ratio, measured.distinct, measured.share) == (0.0, 1, 0.5)
    assert (measured.most_common, measured.times) == ("", 2)


# ---- intervals


def test_an_interval_is_the_percentiles_of_the_resampled_scores():
    """Of resamples with the scores 0, 1, …, 200, 95 % are in 5 … 195, and 50 % are in 50 … 150."""
    for level, low, high in ((0.95, 5, 195), (0.5, 50, 150)):
        scores = iter([*range(201), 77])
        interval = bootstrap.of_statistic(lambda _, scores=scores: next(scores), 3, resamples=201, level=level)
        assert interval == pytest.approx((77, low, high)) and str(interval) == f"77.000 [{low}.000, {high}.000]"


def test_images_are_drawn_with_replacement_from_the_seed():
    recorded: dict[int, list[list[int]]] = {}
    for seed in (0, 0, 1):
        drawn: list[list[int]] = []
        bootstrap.of_statistic(lambda index, drawn=drawn: drawn.append(index.tolist()) or 0.0, 4, resamples=50, seed=seed)
        assert len(drawn) == 51 and drawn[-1] == [0, 1, 2, 3]  # the images themselves come last
        assert {number for each in drawn[:-1] for number in each} == {0, 1, 2, 3} and all(len(each) == 4 for each in drawn)
        assert any(len(set(each)) < 4 for each in drawn) and recorded.setdefault(seed, drawn) == drawn
    assert recorded[0] != recorded[1]


def test_sums_of_counts_are_those_of_drawn_images():
    """Each resample is the sum of as many images as there are. The value is that of all images."""
    sums = []
    interval = bootstrap.of_sums([[1, 0], [0, 10]], lambda s: (sums.append(s), s[..., 0] + s[..., 1])[1], resamples=500, seed=3)
    assert interval.value == 11 and sums[0].tolist() == [1, 10]
    drawn = sums[1]
    assert drawn.shape == (500, 2) and set((drawn[:, 0] + drawn[:, 1] / 10).tolist()) == {2}
    assert 0.2 < (drawn[:, 0] == 2).mean() < 0.3 and (interval.low, interval.high) == (2, 20)
    assert interval == bootstrap.of_sums([[1, 0], [0, 10]], lambda s: s[..., 0] + s[..., 1], resamples=500, seed=3)
    other = [bootstrap.of_mean([1.0, 2.0, 4.0, 8.0], resamples=40, seed=seed) for seed in range(4)]
    assert len({each.low for each in other}) > 1 and {each.value for each in other} == {3.75}


def test_level_resamples_and_seed_change_every_interval():
    values, base = np.arange(20.0), np.zeros(20)
    for of in (bootstrap.of_mean, lambda v, **k: bootstrap.of_difference(v, base, **k)):
        wide, narrow = of(values, level=0.99), of(values, level=0.5)
        assert wide.low < narrow.low < wide.value < narrow.high < wide.high
        assert of(values, seed=1) != of(values, seed=2) and of(values) == of(values, seed=0, resamples=1000, level=0.95)
        assert of(values, resamples=10) != of(values, resamples=11)
    assert bootstrap.of_difference([1.0, 2.0], [3.0, 5.0]).value == -2.5


def test_blocks_bound_the_memory_and_add_up(monkeypatch):
    assert list(bootstrap._blocks(1000, 5000)) == [838, 162]  # 4 million drawn numbers at a time
    monkeypatch.setattr(bootstrap, "BLOCK", 100)
    for resamples, images, blocks in ((10, 30, [3, 3, 3, 1]), (2, 30, [2]), (3, 1000, [1, 1, 1]), (100, 1, [100])):
        assert list(bootstrap._blocks(resamples, images)) == blocks


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: bootstrap.of_sums([1.0, 2.0], np.sum), r"shape \(2,\)"),
        (lambda: bootstrap.of_sums(np.zeros((0, 2)), np.sum), r"shape \(0, 2\)"),
        (lambda: bootstrap.of_sums([[1.0], [np.inf]], lambda s: s[..., 0]), "not a finite number"),
        (lambda: bootstrap.of_mean([1.0, np.nan]), "not a finite number"),
        (lambda: bootstrap.of_mean([]), r"shape \(0, 1\)"),
        (lambda: bootstrap.of_mean([1.0], level=0.0), r"level = 0\.0"),
        (lambda: bootstrap.of_mean([1.0], level=1.0), r"level = 1\.0"),
        (lambda: bootstrap.of_mean([1.0], resamples=0), "resamples = 0"),
        (lambda: bootstrap.of_difference([1.0], [1.0, 2.0]), "one pair per image"),
        (lambda: bootstrap.of_statistic(lambda _: 0.0, 0), "at least one image"),
    ],
)
def test_inputs_without_an_interval_are_errors(act, message):
    with pytest.raises(ValueError, match=message):
        act()
    assert bootstrap.of_mean([1.0], resamples=1) == (1, 1, 1) and bootstrap.of_statistic(lambda _: 2.0, 1) == (2, 2, 2)


# ---- ranks


@pytest.mark.parametrize(
    ("scores", "owner", "message"),
    [
        (np.zeros(3), [0], r"scores of shape \(3,\)"),
        (np.zeros((0, 2)), [0, 0], r"scores of shape \(0, 2\)"),
        (np.zeros((2, 2)), [0, 2], r"must contain 2 indices of 0\.\.1, or booleans"),
        (np.zeros((2, 2)), [0, -1], r"must contain 2 indices of 0\.\.1"),
        (np.zeros((2, 2)), [0], "must contain 2 indices"),
        (np.zeros((2, 2)), [0.0, 1.0], "must contain 2 indices"),
        (np.zeros((1, 2)), [[True, False]], "text 1 belongs to no image"),
        (np.zeros((1, 2)), [[True], [True]], r"image_of_text has the shape \(2, 1\), but the scores have the shape \(1, 2\)"),
        ([[0.0, np.nan]], [0, 0], "a score is NaN"),
    ],
)
def test_scores_that_cannot_be_ranked_are_an_error_with_a_reason(scores, owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval.recalls(scores, owner)


def test_ranks_of_one_image_and_of_the_last_one():
    assert [r.tolist() for r in retrieval.ranks([[3.0, 5.0]], [0, 0])] == [[1], [1, 1]]
    by_image, by_text = retrieval.ranks([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]], [2, 2])  # the first two have no text
    assert (by_image.tolist(), by_text.tolist()) == ([1], [1, 3])


def test_rows_are_ranked_in_blocks_of_bounded_size(monkeypatch):
    recorded = []
    real = np.isnan
    monkeypatch.setattr(retrieval, "BLOCK", 10)
    monkeypatch.setattr(np, "isnan", lambda rows: recorded.append(rows.shape) or real(rows))
    ranks = retrieval.row_ranks(np.arange(20.0).reshape(5, 4), np.eye(5, 4, dtype=bool) | (np.arange(4) == 0))
    assert recorded == [(2, 4), (2, 4), (1, 4)] and ranks.tolist() == [4, 3, 2, 1, 4]


def test_the_summary_names_every_recall_and_rank():
    summary = retrieval.summary("x", np.array([1, 2, 5, 6, 10, 11]))
    assert summary == {"x_r1": 1 / 6, "x_r5": 0.5, "x_r10": 5 / 6, "x_mean_rank": pytest.approx(35 / 6), "x_median_rank": 5.5}

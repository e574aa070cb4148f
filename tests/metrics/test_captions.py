"""Test that scores equal the official ones, that a missing score is None with a reason, and that intervals are correct."""

import itertools
import math
import os
import random
import shutil
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lora_blip.errors import JavaError
from lora_blip.metrics import bootstrap, captions, java, vqa
from lora_blip.metrics.captions import BLEU, NAMES, caption_scores
from lora_blip.metrics.diversity import diversity
from lora_blip.metrics.retrieval import ranks, recalls
from lora_blip.metrics.tokens import plain
from toyworld.words import sentence

IMAGES = 200
ODD = (
    "It's a man's red t-shirt.",
    'a "STOP" sign, isn\'t it?',
    "they're on an up-to-date 3.5 m boat",
    "the dogs' 1,000 toys (all blue)",
    "a 20-year-old woman; she doesn't smile",
    "Mr. Smith's dog at 5 p.m. on No. 5 street",
    "rock 'n' roll in the '80s - a U.S. flag...",
    "two o'clock: 1/2 cup of tea & 50% milk!",
    "“smart” quotes – it’s “here”",
    "cannot tell, gonna wait ... $5 each",
    "a café's naïve [sign] at 5:30 pm",
    "they'd've said 'hello' -- wouldn't you?",
)
TRIPS = (  # texts whose words without Java differ from those of PTBTokenizer
    "an AT&T van",
    "don`t go",
    "US$5 each",
    "1½ cups of tea",
    "a smile ;-) :D",
    "a door 6'10 high",
    "he cannot've been there",
    "a ten lb. fish in <my hand>",
    "see c/c++",
    "3.14t x",
)

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java command here")


@pytest.fixture
def package() -> Path:
    pytest.importorskip("pycocoevalcap.bleu.bleu", reason="pycocoevalcap is not installed")
    folder = captions.package_folder()
    assert folder
    return folder


def varied(images: int, odd: float, seed: int = 0, endings: tuple[str, ...] = ODD) -> tuple[list[str], list[list[str]]]:
    """Return predictions and four references for each. A share `odd` of the texts ends in one of `endings`."""
    rng = random.Random(seed)

    def near(text: str) -> str:
        words = text.split()
        for _ in range(rng.randint(0, 2)):
            words.insert(rng.randint(0, len(words)), rng.choice(("red", "blue", "a", "the", "small")))
        if rng.random() < 0.4 and len(words) > 3:
            words.pop(rng.randrange(len(words)))
        return " ".join(words + ([rng.choice(endings)] if rng.random() < odd else []))

    topics = [sentence(rng) for _ in range(images)]
    return [near(topic) for topic in topics], [[near(topic) for _ in range(4)] for topic in topics]


def refuse(*_args):
    raise JavaError("not asked for in this test")


OTHER_LOCALE = (
    "-Duser.language=de -Duser.country=DE -Duser.region=DE -Duser.language.format=ar -Duser.country.format=EG "
    "-Duser.extensions.format=u-nu-arab -Dfile.encoding=US-ASCII"
)


def in_another_language(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a locale with a decimal comma, Arabic digits, and an encoding without accents."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", OTHER_LOCALE)
    monkeypatch.setenv("_JAVA_OPTIONS", OTHER_LOCALE)
    monkeypatch.setenv("LC_ALL", "C")


def without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


# ---- captions


@needs_java
@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_with_java_every_score_is_that_of_pycocoevalcap(monkeypatch):
    """Scores of sets and images equal those of its tokenizer and scorers to 1e-9, on 200 × 4 captions.

    Ours are computed under another language: METEOR reads its own numbers back, and failed at a decimal comma.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    meteor = Meteor()  # this Java process runs at the same time as ours
    predictions, references = varied(IMAGES, odd=0.3)
    with monkeypatch.context() as patch:
        in_another_language(patch)
        ours = caption_scores(predictions, references)
    gts = PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(references)})
    res = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
    of_set, by_image = Bleu(4).compute_score(gts, res, verbose=0)
    official = dict(zip(BLEU, zip(of_set, by_image, strict=True), strict=True))
    official |= {"METEOR": meteor.compute_score(gts, res), "ROUGE-L": Rouge().compute_score(gts, res)}
    official["CIDEr"] = Cider().compute_score(gts, res)
    for name, (expected, expected_by_image) in official.items():
        assert ours.values[name] == pytest.approx(expected, abs=1e-9), name
        np.testing.assert_allclose(ours.per_image[name], expected_by_image, rtol=0, atol=1e-9, err_msg=name)
        assert 0.05 < expected < 9, name
    assert ours.tokenizer == captions.PTB and set(ours.values) == set(NAMES)


@needs_java
@pytest.mark.parametrize(
    ("odd", "endings", "bound"), [pytest.param(0.5, ODD, 1e-9, marks=pytest.mark.slow), (0.1, TRIPS, 0.01)]
)
@pytest.mark.usefixtures("package")
def test_without_java_scores_stay_within_the_stated_distance(monkeypatch, tmp_path, odd, endings, bound):
    """BLEU and ROUGE-L differ by at most `bound`, CIDEr by ten times as much. METEOR and SPICE are None, with a reason."""
    monkeypatch.setattr(captions.java, "meteor", refuse)
    monkeypatch.setattr(captions.java, "spice", refuse)
    for seed in range(3):
        predictions, references = varied(IMAGES, odd, seed, endings)
        with_java = caption_scores(predictions, references)
        with monkeypatch.context() as patch:
            without_java(patch, tmp_path)
            alone = caption_scores(predictions, references)
        assert with_java.tokenizer == captions.PTB and alone.tokenizer == captions.PLAIN
        for name in (*BLEU, "ROUGE-L", "CIDEr"):
            assert abs(with_java.values[name] - alone.values[name]) <= bound * (10 if name == "CIDEr" else 1), name
        assert alone.values["METEOR"] is None and alone.values["SPICE"] is None
        assert "no `java` command" in alone.reasons["METEOR"] and "no `java` command" in alone.reasons["SPICE"]


@needs_java
def test_words_without_java_are_ptbtokenizer_s(package):
    """Compare the words of unusual captions and of 2,000 sentences of the toy world."""
    rng = random.Random(1)
    texts = [*ODD, *(sentence(rng) for _ in range(2000))]
    assert [plain(text) for text in texts] == java.tokenize(texts, package)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("It's a man's (red) T-shirt.", "it 's a man 's -lrb- red -rrb- t-shirt"),
        ("don't, couldn't've; I'm they'll", "do n't could n't 've i 'm they 'll"),
        ("\"a\" ''b'' ``c`` “d” ‘e’", "a b c d e"),
        ("1,000 - 3.5 -- 1/2 ... 50%", "1,000 3.5 1/2 50 %"),
        ("Mr. X at 5 p.m.", "mr. x at 5 p.m."),
        ("cannot o'clock 'tis y'all", "can not o'clock 't is y' all"),
        (" .\n ", ""),
    ],
)
def test_words_without_java_by_hand(caption, words):
    assert plain(caption) == words


@needs_java
def test_line_ends_and_empty_captions_do_not_shift_other_captions(package):
    """A caption with any line end, a half surrogate pair or no text does not shift the other captions."""
    texts = ["a\r\nb\u2028c\x0bd\x85e", "", "a ||| b", "x \ud800", ".", "last", ""]
    assert java.tokenize(texts, package) == ["a b c d e", "", "a | | | b", "x", "", "last", ""]


def test_without_pycocoevalcap_there_is_one_reason_and_exact_match(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu_scorer", None)
    scores = caption_scores(["a red cube", "b"], [["A red cube."], ["c"]])
    assert scores.values.pop("exact match") == 0.5 and set(scores.values.values()) == {None}
    assert set(scores.reasons.values()) == {captions.MISSING} and set(scores.reasons) == set(captions.COCO)
    assert scores.per_image == {"exact match": [1, 0]} and list(captions.intervals(scores)) == ["exact match"]


@pytest.mark.usefixtures("package")
def test_several_references_count_by_image(monkeypatch, tmp_path):
    """A prediction is right if it equals one of its own references. References of other images do not count."""
    without_java(monkeypatch, tmp_path)
    references = [["a red cube on a table", "one cube"], ["two blue balls in a box", "balls"], ["a dog runs in the park"]]
    right = caption_scores([texts[0] for texts in references], references)
    shifted = caption_scores([texts[0] for texts in references[1:] + references[:1]], references)
    for name in ("BLEU-4", "ROUGE-L", "exact match"):
        assert right.per_image[name] == pytest.approx([1, 1, 1], abs=1e-6)
    assert right.per_image["CIDEr"][2] == pytest.approx(10, abs=1e-6)
    assert max(shifted.per_image["exact match"]) == 0 and shifted.values["CIDEr"] < right.values["CIDEr"] / 5


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.usefixtures("package")
def test_cider_of_one_image_or_of_equal_references_is_0_with_a_reason(monkeypatch, tmp_path, images):
    without_java(monkeypatch, tmp_path)
    scores = caption_scores(["a red cube"] * images, [["a red cube"]] * images)
    assert scores.values["CIDEr"] == 0 and scores.reasons["CIDEr"] == captions.ALL_WEIGHTS_ZERO
    assert "CIDEr" not in caption_scores(["a", "b"], [["a"], ["b"]]).reasons
    assert caption_scores(["...", "."], [["."], ["!"]]).values["CIDEr"] == 0


@pytest.mark.usefixtures("package")
def test_bleu_of_texts_without_n_grams_has_a_note(monkeypatch, tmp_path):
    """BLEU-4 of right captions of three words is a constant: 3.2 %. A note also counts the short texts."""
    without_java(monkeypatch, tmp_path)
    right = caption_scores(["one blue cube", "a red ball"], [["one blue cube"], ["a red ball"]])
    assert right.values["exact match"] == 1 and right.values["BLEU-4"] == pytest.approx(0.0316, abs=1e-4)
    assert "no generated text has 4 words" in right.reasons["BLEU-4"] and "BLEU-3" not in right.reasons
    assert "BLEU-4" in right.meaningless and "BLEU-3" not in right.meaningless
    long = ["a red cube on a table", "two blue balls in a box"]
    no_match = caption_scores(long, [["red cube"], ["two balls"]])
    assert "no reference has 3 words" in no_match.reasons["BLEU-3"] and "BLEU-2" not in no_match.reasons
    mixed = caption_scores([long[0], "two balls"], [[long[0]], [long[1]]])
    assert mixed.reasons["BLEU-4"].startswith("1 of 2 generated texts have fewer than 4 words") and not mixed.meaningless
    assert not {*captions.BLEU} & caption_scores(long, [[text] for text in long]).reasons.keys()


@pytest.mark.usefixtures("package")
def test_each_score_is_computed_inside_its_own_context(monkeypatch):
    """A log can then name the score that runs, which matters for METEOR and SPICE: they take a minute or more."""
    running, computed = [], []

    @contextmanager
    def working(name):
        running.append(name)
        yield
        running.remove(name)

    def score(predictions, *_arguments):
        computed.extend(running)
        return 0.5, [0.5] * len(predictions)

    monkeypatch.setattr(java, "tokenize", lambda texts, _package: computed.extend(running) or texts)
    monkeypatch.setattr(java, "meteor", score)
    monkeypatch.setattr(java, "spice", score)
    caption_scores(["a red cube"], [["a red cube"]], working=working)
    assert computed == ["the words, by Java's PTBTokenizer", "METEOR, by Java", "SPICE, by Java"] and not running


@pytest.mark.parametrize(
    ("predictions", "references", "reason"),
    [
        ([], [], "no predictions"),
        (["a"], [], "1 predictions for 0"),
        (["a", "b"], [["a"], []], "prediction 1 has no references"),
        (["a"], ["a cube"], "the references of prediction 0 are one text"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(predictions, references, reason):
    with pytest.raises(ValueError, match=reason):
        caption_scores(predictions, references)


@pytest.mark.usefixtures("package")
def test_bleu_from_summed_counts_is_the_scorer_s():
    """BLEU from summed counts equals BleuScorer on random sets of captions. A resample is such a set."""
    from pycocoevalcap.bleu.bleu import Bleu

    predictions, references = varied(60, odd=0)
    predictions[0], predictions[1] = "", "a"
    counts = captions.bleu_counts(predictions, references)
    for seed in range(20):
        taken = np.random.default_rng(seed).integers(60, size=60)
        gts, res = {i: references[k] for i, k in enumerate(taken)}, {i: [predictions[k]] for i, k in enumerate(taken)}
        expected = Bleu(4).compute_score(gts, res, verbose=0)[0]
        assert [captions.bleu(counts[taken].sum(0), order) for order in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("package")
def test_intervals_and_gains_contain_their_scores(monkeypatch, tmp_path):
    """The value of an interval is the score, and low ≤ value ≤ high. The gain over itself is 0, over worse captions above 0."""
    without_java(monkeypatch, tmp_path)
    predictions, references = varied(80, odd=0)
    good, bad = caption_scores(predictions, references), caption_scores(predictions[1:] + predictions[:1], references)
    intervals = captions.intervals(good)
    assert set(intervals) == {"exact match", *BLEU, "ROUGE-L", "CIDEr"}
    for name, interval in intervals.items():
        assert interval.value == pytest.approx(good.values[name], abs=1e-9)
        assert interval.low < interval.value < interval.high or name == "exact match"
    assert all(interval == (0, 0, 0) for interval in captions.gains(good, good).values())
    for name, interval in captions.gains(good, bad).items():
        assert interval.value == pytest.approx(good.values[name] - bad.values[name], abs=1e-9)
        assert interval.low > 0 or name == "exact match"


# ---- Java's programs, replaced by scripts


def replace_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a script named `java` first on the PATH."""
    fake = tmp_path / "bin" / "java"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(java, "START", 2.0)
    monkeypatch.setattr(java, "EACH", 0.0)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "caption", "reason"),
    [
        ("echo 'out of memory' >&2; exit 3", 100_000, "out of memory"),  # more letters than a pipe holds
        ("exec sleep 60", 100_000, "stopped after 2 s"),
        ("exec sleep 60", 1, "stopped after 2 s"),
        ("yes nonsense", 1, "nonsense"),
        ("read -r line; echo '1.0 2.0'", 1, "METEOR failed"),
    ],
)
def test_a_failure_of_meteor_is_reported_as_a_reason_within_the_time_limit(tmp_path, monkeypatch, script, caption, reason):
    replace_java(tmp_path, monkeypatch, script)
    began = time.monotonic()
    with pytest.raises(JavaError, match=reason):
        java.meteor(["a" * caption] * 9, [["a"]] * 9, tmp_path)
    assert time.monotonic() - began < 20


def test_meteor_gets_one_line_per_image_for_any_captions(tmp_path, monkeypatch):
    """Bars and line ends in a caption do not split fields. The counts are sent in one EVAL line."""
    log = tmp_path / "log"
    replace_java(
        tmp_path,
        monkeypatch,
        f'while read -r line; do echo "$line" >> {log}; echo 0.5; [ "$line" != "${{line#EVAL}}" ] && yes 0.5; done',
    )
    assert java.meteor(["x ||| y\nz", ""], [["a|||b", "EVAL"], ["c"]], tmp_path) == (0.5, [0.5, 0.5])
    requests = ["SCORE ||| a b ||| EVAL ||| x y z", "SCORE ||| c |||", "EVAL ||| 0.5 ||| 0.5"]
    assert [line.rstrip() for line in log.read_text().splitlines()] == requests


@pytest.mark.parametrize(
    ("script", "reason"),
    [("exit 1", "failed with exit status 1"), ("exec sleep 60", "stopped after 2 s"), ("cat; echo", "4 lines for 3")],
)
@pytest.mark.usefixtures("package")
def test_if_the_tokenizer_fails_the_scores_without_it_are_computed(tmp_path, monkeypatch, script, reason):
    replace_java(tmp_path, monkeypatch, script)
    scores = caption_scores(["a red cube"], [["a red cube", "it's red"]])
    assert reason in scores.reasons["METEOR"] and scores.tokenizer == captions.PLAIN
    assert scores.values["ROUGE-L"] == pytest.approx(1) and scores.values["METEOR"] is None


def test_spice_returns_its_f_score_or_the_reason_if_its_models_are_missing(tmp_path, monkeypatch):
    """If a jar is missing, nothing is downloaded or run. Otherwise the mean and the scores by image are returned."""
    replace_java(tmp_path, monkeypatch, "echo ran >> " + str(tmp_path / "log"))
    with pytest.raises(JavaError, match=r"stanford-corenlp-3\.6\.0.*get_stanford_models"):
        java.spice(["a"], [["a"]], tmp_path)
    assert not (tmp_path / "log").exists()

    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in java.SPICE_MODELS:
        (tmp_path / "spice" / "lib" / name).touch()
    with pytest.raises(JavaError, match="unreadable scores"):
        java.spice(["a"], [["a"]], tmp_path)
    assert (tmp_path / "log").exists()
    items = '[{"image_id":1,"scores":{"All":{"f":0.5}}},{"image_id":0,"scores":{"All":{"f":0.25}}}]'
    (tmp_path / "bin" / "java").write_text(f'#!/bin/sh\nwhile [ "$1" != -out ]; do shift; done\necho \'{items}\' > "$2"\n')
    assert java.spice(["a", "b"], [["a"], ["b"]], tmp_path) == (0.375, [0.25, 0.5])


@needs_java
def test_java_runs_in_english_in_every_locale(package, monkeypatch):
    """Turkish has another lower case of I. The scores are compared in `test_with_java_every_score_is_that_of_pycocoevalcap`."""
    in_another_language(monkeypatch)
    texts = ["a white cube on a café TABLE I", "IN ISTANBUL 1.5"]
    assert java.tokenize(texts, package) == ["a white cube on a café table i", "in istanbul 1.5"]


def test_every_java_program_gets_the_locale_last(tmp_path, monkeypatch, package):
    """_JAVA_OPTIONS overrides all other options, and its last entry counts. Earlier entries of the user are kept."""
    log = tmp_path / "log"
    replace_java(tmp_path, monkeypatch, f'echo "$_JAVA_OPTIONS" >> {log}; echo "Picked up _JAVA_OPTIONS: x" >&2; exit 1')
    monkeypatch.setenv("_JAVA_OPTIONS", "-Xmx1g -Duser.language=de")
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in java.SPICE_MODELS:
        (tmp_path / "spice" / "lib" / name).touch()
    for run in (java.meteor, java.spice, lambda texts, _, folder: java.tokenize(texts, folder)):
        with pytest.raises(JavaError, match="it wrote nothing"):  # Java's own notice is no reason
            run(["a"], [["a"]], tmp_path if run is java.spice else package)
    arguments = log.read_text().splitlines()
    assert len(arguments) == 3 and len(set(arguments)) == 1 and arguments[0].startswith("-Xmx1g -Duser.language=de ")
    last = dict(part.split("=") for part in arguments[0].split() if "=" in part)
    assert last["-Duser.language"] == last["-Duser.language.format"] == "en" and last["-Dfile.encoding"] == "UTF-8"


# ---- VQA


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The cat.", "cat"),
        ("Two cats", "2 cats"),
        ("none", "0"),
        ("isnt it", "isn't it"),
        ("youdve", "youdve"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma in a number: marks are removed without a space
        ("t-shirt", "t shirt"),
        ("yes, sir", "yes sir"),
        ("red/white", "red white"),
        ("red / white", "red  white".replace("  ", " ")),
        ("U.S.", "us"),
        ("3.5", "3.5"),
        ("a\nb\tc", "b c"),
        ("man's", "man's"),  # apostrophes and colons stay in this version of the rules
        ("10:30", "10:30"),
        ("what?!", "what"),
    ],
)
def test_vqa_answers_are_normalised_as_officially(answer, normalised):
    assert vqa.normal(answer) == normalised


def test_the_contractions_are_the_official_114():
    """The table contains the entries of the official table that change a word in lower case."""
    assert len(vqa.CONTRACTIONS) == 114
    assert vqa.CONTRACTIONS["oclock"] == "o'clock" and vqa.CONTRACTIONS["y'alld've"] == "y'all'd've"


def test_vqa_accuracy_is_the_mean_over_the_ten_subsets_of_nine():
    """Compare with the mean of min(n / 3, 1) over itertools.combinations, for every number n of equal answers."""
    for equal in range(11):
        answers = ["cat"] * equal + ["dog", "bird"] * ((10 - equal) // 2) + ["cow"] * (equal % 2)
        subsets = itertools.combinations(answers, 9)
        expected = statistics.fmean(min(subset.count("cat") / 3, 1) for subset in subsets)
        assert vqa.accuracy("The cat.", answers) == pytest.approx(expected if 0 < equal < 10 else 0.0)
    assert vqa.accuracy("cat", ["cat"] * 10) == 1


@pytest.mark.parametrize(("equal", "by_hand"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_vqa_accuracy_by_hand(equal, by_hand):
    assert vqa.accuracy("2", ["two"] * equal + [f"other{k}" for k in range(10 - equal)]) == pytest.approx(by_hand)


def test_if_all_ten_answers_are_equal_only_case_is_ignored():
    assert vqa.accuracy("Yes", ["yes"] * 10) == 1
    assert vqa.accuracy("two", ["2"] * 10) == 0
    assert vqa.accuracy("two", ["2"] * 9 + ["3"]) == 1


def test_with_fewer_than_four_answers_one_equal_answer_is_right():
    assert vqa.accuracy("Two", ["2"]) == 1 and vqa.accuracy("the two", ["one", "2."]) == 1
    assert vqa.accuracy("3", ["2", "1", "0"]) == 0 and vqa.accuracy("2", ["2", "two", "1"]) == 1
    assert vqa.accuracy("a", ["b", "b", "b", "c"]) == 0 and vqa.accuracy("b", ["b", "b", "b", "b"]) == 1
    assert vqa.vqa_accuracy(["2", "no"], [["two"], ["yes"]]) == 0.5
    for refused in (lambda: vqa.accuracy("a", []), lambda: vqa.vqa_accuracy([], []), lambda: vqa.vqa_accuracy(["a"], [])):
        with pytest.raises(ValueError):
            refused()


# ---- retrieval


def brute(scores: np.ndarray, owner: list[int]) -> tuple[list[int], list[int]]:
    """The oracle sorts the candidates, wrong ones first among equal scores, and takes the first right one."""
    by_image, by_text = [], []
    for image, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda text: (-row[text], owner[text] == image))
        if image in owner:
            by_image.append(1 + next(place for place, text in enumerate(order) if owner[text] == image))
    for text, column in enumerate(scores.T):
        order = sorted(range(len(column)), key=lambda image: (-column[image], owner[text] == image))
        by_text.append(1 + order.index(owner[text]))
    return by_image, by_text


@pytest.mark.parametrize("seed", range(8))
def test_ranks_equal_those_of_sorting_with_ties_counted_as_errors(seed, monkeypatch):
    """The inputs have many ties, several captions per image, and images without captions."""
    rng = np.random.default_rng(seed)
    scores, owner = rng.integers(0, 6, (17, 40)).astype(np.float32), rng.integers(0, 15, 40).tolist()
    if seed % 2:
        monkeypatch.setattr("lora_blip.metrics.retrieval.BLOCK", 100)
    by_image, by_text = brute(scores, owner)
    computed = ranks(scores, owner)
    assert (computed[0].tolist(), computed[1].tolist()) == (by_image, by_text)
    everything = recalls(scores, owner)
    for way, expected in (("image_to_text", by_image), ("text_to_image", by_text)):
        for most in (1, 5, 10):
            assert everything[f"{way}_r{most}"] == sum(rank <= most for rank in expected) / len(expected)
        assert everything[f"{way}_mean_rank"] == pytest.approx(statistics.fmean(expected))
        assert everything[f"{way}_median_rank"] == statistics.median(expected)


def test_recalls_by_hand():
    """Image 0 has the texts 0 and 1. Image 1 has the text 2, which ranks after the text 0."""
    values = recalls([[0.9, 0.1, 0.2], [0.8, 0.0, 0.7]], [0, 0, 1])
    assert (values["image_to_text_r1"], values["image_to_text_mean_rank"]) == (0.5, 1.5)
    assert (values["text_to_image_r1"], values["text_to_image_r5"]) == (1.0, 1.0)


def test_constant_scores_have_a_recall_of_zero():
    values = recalls(np.zeros((50, 100)), np.arange(100) // 2)
    assert values["image_to_text_r10"] == values["text_to_image_r10"] == 0
    assert values["image_to_text_mean_rank"] == 99 and values["text_to_image_mean_rank"] == 50


def test_a_text_of_several_images_counts_for_the_best_of_them():
    right = np.array([[True, False], [True, False], [False, True]])
    assert ranks([[0.1, 0.9], [0.5, 0.0], [0.3, 0.2]], right)[1].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("scores", "owner"),
    [
        (np.zeros(3), [0]), (np.zeros((2, 2)), [0, 2]), (np.zeros((2, 2)), [0]), (np.zeros((2, 2)), [0.0, 1.0]),
        ([[0.0, math.nan]], [0, 0]), (np.zeros((1, 2)), [[True, False]]),
    ],
)  # fmt: skip
def test_retrieval_that_cannot_be_scored_is_refused(scores, owner):
    with pytest.raises(ValueError):
        recalls(scores, owner)


# ---- diversity


def test_diversity_by_hand():
    measured = diversity(["A red cube.", "a red cube", "a blue ball"])
    assert (measured.distinct, measured.share, measured.type_token_ratio) == (2, pytest.approx(2 / 3), 5 / 9)
    assert (measured.most_common, measured.times, measured.warning) == ("A red cube.", 2, "")
    with pytest.raises(ValueError):
        diversity([])


def test_one_caption_for_most_images_is_a_collapse_unless_the_references_repeat_it():
    predictions = ["a cube"] * 6 + ["a ball"] * 4
    assert "6 of 10 predictions (60%) are 'a cube'" in diversity(predictions, [[f"thing {k}"] for k in range(10)]).warning
    assert diversity(predictions).warning and not diversity(predictions, [["a cube"]] * 7 + [["a ball"]] * 3).warning
    assert not diversity(["a cube"] * 5 + ["a ball"] * 5).warning and not diversity(["a cube"] * 3).warning


# ---- bootstrap


def test_the_interval_of_a_mean_equals_the_closed_form():
    """For normal scores, the interval is mean ± 1.96 σ / √n, within 5 % of its width, also if it is computed by indices."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    half = 1.96 * values.std() / 20
    for interval in (
        bootstrap.of_mean(values, resamples=20_000),
        bootstrap.of_statistic(lambda index: float(values[index].mean()), 400, resamples=20_000),
    ):
        assert interval.value == pytest.approx(values.mean())
        assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_95_percent_of_the_intervals_contain_the_true_mean():
    """For 400 samples of 60 skewed scores, 91 to 98 % of the intervals contain the true mean."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(400):
        interval = bootstrap.of_mean(rng.beta(2, 1, 60), seed=seed)
        held += interval.low <= 2 / 3 <= interval.high
    assert 0.91 <= held / 400 <= 0.98


def test_equal_scores_have_an_interval_of_no_width():
    assert bootstrap.of_mean([0.1] * 7) == (0.1, 0.1, 0.1)
    assert bootstrap.of_difference([0.3, 0.9], [0.3, 0.9]) == (0, 0, 0)


def test_pairing_narrows_the_interval_of_a_gain():
    """Scores vary much between images, but gains do not: the paired interval is narrow. The seed determines it."""
    rng = np.random.default_rng(2)
    base = rng.uniform(0, 1, 200)
    adapted = base + rng.normal(0.02, 0.01, 200)
    interval = bootstrap.of_difference(adapted, base, seed=3)
    alone = bootstrap.of_mean(adapted)
    assert 0 < interval.low < interval.value < interval.high and interval.high - interval.low < 0.1 * (alone.high - alone.low)
    assert interval == bootstrap.of_difference(adapted, base, seed=3) != bootstrap.of_difference(adapted, base, seed=4)


def test_many_images_are_resampled_in_blocks_with_the_same_distribution(monkeypatch):
    values = np.random.default_rng(5).normal(0, 1, 300)
    expected = bootstrap.of_mean(values)
    monkeypatch.setattr(bootstrap, "BLOCK", 900)
    assert bootstrap.of_mean(values) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: bootstrap.of_mean([]), lambda: bootstrap.of_mean([0.0, math.nan]), lambda: bootstrap.of_mean([1.0], level=1.0),
        lambda: bootstrap.of_difference([1.0], [1.0, 2.0]), lambda: bootstrap.of_statistic(float, 0),
        lambda: bootstrap.of_mean([1.0], resamples=0),
    ],
)  # fmt: skip
def test_invalid_inputs_of_the_bootstrap_are_errors(refused):
    with pytest.raises(ValueError):
        refused()

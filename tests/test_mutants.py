"""Mutation testing finds what a weak test suite does not notice, and nothing else."""

import re
from pathlib import Path

import pytest

from benchmarks.robustness import mutants
from benchmarks.robustness.mutants import Tree
from benchmarks.robustness.mutations import mutations

GRADE = '''"""Grades."""


def grade(points: int) -> str:
    """Return "pass" from 50 points."""
    return "pass" if points >= 50 else "fail"


def count(points: int) -> int:
    while points > 2:
        points -= 1
    return points


def unused() -> int:
    return 3


if __name__ == "__main__":
    print(grade(50))
'''
TEST_GRADE = """import subprocess, sys
from toy.grade import count, grade

def test_fail():
    assert grade(48) == "fail"

def test_pass_in_a_subprocess():
    assert subprocess.run([sys.executable, "-m", "toy.grade"], capture_output=True, text=True).stdout == "pass\\n"

def test_count():
    assert count(4) == 2

def test_broken():
    assert False
"""


@pytest.fixture
def toy(tmp_path: Path) -> Tree:
    for name, text in {"toy/__init__.py": "", "toy/grade.py": GRADE, "tests/test_grade.py": TEST_GRADE}.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree(tmp_path / "toy", "toy", tmp_path / "work", (), (), spare=1.0)


def test_the_survivors_are_the_faults_that_no_test_notices(toy: Tree) -> None:
    """Mutants of an untested boundary and an unexecuted line survive.

    One in a subprocess is killed, and an endless loop times out.
    """
    operators = ("GtE to Gt", "50 to 51", "50 to 49", "3 to 4", "delete assignment")
    chosen = [m for m in mutants.candidates(toy, ["toy/grade.py"]) if m.operator in operators]
    results = {each.mutant.key.split(" | ", 1)[1]: each for each in mutants.run(toy, chosen, workers=1)}
    survivors = {key: each.status for key, each in results.items() if each.status in mutants.SURVIVED}
    assert survivors == {
        'grade | return "pass" if points >= 50 else "fail" | 50 to 49': "survived",
        "unused | return 3 | 3 to 4": "uncovered",
    }
    in_child = results['grade | return "pass" if points >= 50 else "fail" | GtE to Gt']
    assert in_child.killer == "tests/test_grade.py::test_pass_in_a_subprocess"
    assert results["count | points -= 1 | delete assignment"].status == "timeout"
    assert (toy.root / "toy" / "grade.py").read_text() == GRADE


def test_a_mutant_changes_code_and_no_text_for_people() -> None:
    source = '''
def f(x: int = 1) -> str:
    """Say 2."""
    if x > 3:
        raise ValueError("more than 4")
    print("less than", 5)
    return f"{x + 6}"
'''
    mutants_found = mutations("f.py", source.encode())
    changed = {(m.line, m.operator) for m in mutants_found}
    assert {(2, "1 to 2"), (4, "Gt to GtE"), (4, "if False"), (5, "delete raise"), (7, "return None")} <= changed
    assert not any(re.search("[2456]", m.operator) for m in mutants_found if m.line in (3, 5, 6, 7))
    for mutant in mutants_found:
        compile(mutant.apply(source.encode()), "f.py", "exec")


def test_a_draw_changes_only_where_the_code_does(toy: Tree) -> None:
    """A draw with the same seed has the same mutants for all unchanged lines."""
    parts = {"grade": ["toy/grade.py"]}
    before = {m.key for m in mutants.drawn(toy, parts, 8, seed=1)}
    toy.sources["toy/grade.py"] = ("import math\n\n" + GRADE.replace("return 3", "return math.pi")).encode()
    after = {m.key for m in mutants.drawn(toy, parts, 8, seed=1)}
    unchanged = {key for key in before if "return 3" not in key}
    assert len(before) == 8 and unchanged <= after
    assert before != {m.key for m in mutants.drawn(toy, parts, 8, seed=2)}


def test_every_named_mutant_is_in_the_code() -> None:
    """The source text of every named mutant exists. Otherwise, the mutant would test nothing."""
    assert len(mutants.named(Tree())) == len(mutants.NAMED)


def test_the_score_leaves_equivalent_mutants_out_and_counts_unfinished_ones() -> None:
    statuses = ["killed", "timeout", "survived", "unfinished", "uncovered", "equivalent"]
    assert mutants._score([{"status": status} for status in statuses])["score"] == 0.4

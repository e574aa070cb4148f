"""Every row of the benchmarks runs end to end on the smallest models. These tests check what a row measures, not its speed."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from benchmarks.__main__ import ROWS, main
from benchmarks.contestants import ours, peers, trainer
from benchmarks.rows import memory
from benchmarks.studies import growth, memory_table
from benchmarks.suite import bars, pairs, report, sizes
from benchmarks.suite.pairs import FLOOR, FULL, HANDMADE, OURS, PEFT, PRODUCTS, TRAINER, Cell
from benchmarks.suite.plan import Budget, Plan, quick
from benchmarks.suite.sizes import backbone, copy_of
from benchmarks.suite.work import TOKENS, UNEVEN, work
from lora_blip.data.example import Example
from lora_blip.data.loader import HostBatch
from lora_blip.kernels import paths
from lora_blip.lora import injection
from lora_blip.models.loading import load_backbone
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training import preflight


@pytest.fixture
def plan() -> Plan:
    return quick(rounds=1)


ROWS_ON_A_CPU = [name for name in ROWS if name != "compiled"]  # it needs a compiler


QUICK = ("input",)  # `make slow` runs every other row


@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] * (row not in QUICK)) for row in ROWS_ON_A_CPU])
def test_a_row_measures_every_contestant(row: str, plan: Plan) -> None:
    """Each comparison has its reference, the same number of figures for each contestant, and finite ratios."""
    cells = list(ROWS[row](plan))
    assert cells
    for cell in cells:
        assert cell.row == row and cell.reference in cell.figures and any(name.startswith(OURS) for name in cell.figures)
        assert len({len(figures) for figures in cell.figures.values()}) == 1
        assert all(math.isfinite(value) and value > 0 for figures in cell.figures.values() for value in figures)
        assert cell.ratios()[cell.reference] == {"median": 1, "min": 1, "max": 1}


@pytest.mark.slow
def test_the_compiled_row_runs(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are captured and executed without a compiler, which takes a minute. test_compile.py uses a compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (cell,) = ROWS["compiled"](plan)
    assert cell.figures.keys() == {OURS, PEFT} == cell.notes["first step with compiling, s"].keys()


@pytest.mark.slow
def test_the_step_row_has_every_way_to_train(plan: Plan) -> None:
    first = next(iter(ROWS["step"](plan)))
    assert first.figures.keys() == {OURS, PEFT, TRAINER, FULL, FLOOR, HANDMADE, PRODUCTS}


def test_trainer_computes_in_16_bits_however_often_it_trains(plan: Plan) -> None:
    """A row uses one model in all its turns, and accelerate casts in each turn."""
    base, dtypes = backbone(plan.size("tiny"), "cpu"), []
    model, inputs = peers.with_peft(base), peers.inputs_of(base, work(base))
    linear = base.model.vision_model.encoder.layers[0].mlp.fc1
    linear.register_forward_hook(lambda _module, _args, output: dtypes.append(output.dtype))
    for _ in range(3):
        assert trainer.seconds_a_step(model, inputs, "bf16", 1, "cpu") > 0
    assert dtypes == [torch.bfloat16] * 6


@pytest.mark.slow
def test_growth_varies_one_quantity_at_a_time(plan: Plan) -> None:
    """Each of the four quantities has seconds and megabytes."""
    cells = list(growth.growth(plan, "fp32"))
    assert [cell.unit for cell in cells] == ["s", "MB"] * 4
    assert [cell.setting.split(", ")[1].split(" ")[0] for cell in cells[::2]] == ["image", "r", "targets", "captions"]


# ---------------------------------------------------------------- the harness


@pytest.mark.slow
def test_contestants_take_turns_in_an_order_that_is_reversed_every_round() -> None:
    """A B C, C B A, A B C, after a warm-up; ratios are taken round by round."""
    order: list[str] = []
    figures = {"a": iter([9, 2, 4, 6]), "b": iter([9, 1, 4, 3])}

    def turn(name: str) -> float:
        order.append(name)
        return float(next(figures[name]))

    cell = pairs.compare("row", "", {name: lambda name=name: turn(name) for name in figures}, "b", rounds=3)
    assert "".join(order) == "ababbaab"
    assert cell.ratios()["a"] == {"median": 2, "min": 1, "max": 2}
    assert cell.figures["a"] == [2, 4, 6] and cell.first == {"a": 9, "b": 9}


@pytest.mark.parametrize("size", ["mini", "mini2", "mini2-t5"])
def test_both_sides_learn_from_the_same_loss(size: str) -> None:
    """Our loss of a batch equals the loss that transformers computes for the peers' inputs, also for uneven captions."""
    base = backbone(size)
    for batch in (work(base), work(base, captions=3, uneven=True)):
        our_loss = ours.Training(base, batch, "fp32").forward()
        peft_loss = peers.peft_loop(copy_of(base), batch, "fp32").forward()
        assert torch.allclose(our_loss, peft_loss, rtol=1e-5)


@pytest.mark.slow
def test_every_contestant_trains_and_the_floor_does_not() -> None:
    base = backbone("mini")
    batch = work(base)
    for side in (
        ours.Training(base, batch, "fp32"),
        peers.handmade(copy_of(base), batch),
        peers.full(base, batch, "fp32"),
    ):
        before = float(side.forward().detach())
        for _ in range(20):
            side.step()
        assert float(side.forward().detach()) < before
    untrained = peers.floor(backbone("mini"), batch, "fp32")
    before = float(untrained.forward().detach())
    untrained.step()
    assert float(untrained.forward().detach()) == before and not untrained.trained


def test_captions_have_the_stated_numbers_of_tokens() -> None:
    base = backbone("mini")
    assert peers.inputs_of(base, work(base))["input_ids"].shape[1] == TOKENS
    counts = peers.inputs_of(base, work(base, 4, 5, uneven=True))["attention_mask"].sum(1)
    assert UNEVEN[0] <= int(counts.min()) < int(counts.max()) <= UNEVEN[1]


def test_the_bytes_that_autograd_keeps_are_counted_once_without_parameters() -> None:
    """x · w keeps x, exp keeps its output, and adding zero keeps nothing."""
    model = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)

    def forward() -> torch.Tensor:
        return (model(x) + 0).exp().sum()

    assert memory.kept_bytes(model, forward) == 4 * 8 * 4 * 2


def test_generation_is_of_a_fixed_length_on_both_sides() -> None:
    for size in ("mini", "mini2"):
        base = backbone(size)
        peer_ids = [peers.generate(base, work(base).pixel_values, beams, 6) for beams in (1, 3)]
        assert peer_ids[0].shape == peer_ids[1].shape
        assert len(ours.generate(ours.adapt(base, merged=True), work(base).pixel_values, 3, 6)) == 2


def test_a_comparison_that_would_end_too_late_is_left_out_by_name() -> None:
    """It is expected to take as long as the longest one of its row. A shorter row may still be measured."""
    now = [0.0]
    budget = Budget(100, lambda: now[0])
    assert budget.allows("card", "large")
    now[0] = 60
    assert not budget.allows("card", "base") and budget.left_out == ["card: base"]
    budget.longest["merge"] = 30
    assert budget.allows("merge", "base") and budget.left_out == ["card: base"]
    now[0] = 95
    assert not budget.allows("merge", "large") and budget.longest == {"card": 60, "merge": 35}


def test_a_row_without_time_is_empty_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file names the commit, and what was left out."""
    assert main(["--quick", "--only", "merge", "--minutes", "0.001", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["left_out"] == ["merge: base fp32"] and not result["cells"] and "merge: base fp32" in capsys.readouterr().out
    assert set(result["commit"]) <= set("0123456789abcdef+")


# ---------------------------------------------------------------- what is written


def cell() -> Cell:
    return Cell("step", "base fp32", PEFT, "s", {OURS: [1.0, 3.0], PEFT: [2.0, 4.0], FULL: [9.0, 9.5]})


def test_a_result_is_never_overwritten_and_can_be_read(tmp_path: Path) -> None:
    """Two runs of one day have two names. The JSON and the .md contain the ratios, with their smallest and largest value."""
    paths = [report.collect({"step": [cell()]}, tmp_path)[0] for _ in range(2)]
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.md"))) == 2 and paths[0] != paths[1]
    result = json.loads(paths[0].read_text())
    assert {"cpu", "cores", "threads"} <= result["machine"].keys() and {"torch", "peft", "python"} <= result["versions"].keys()
    assert (
        result["command"]
        and result["date"]
        and result["cells"][0]["ratios"][OURS] == {"median": 0.625, "min": 0.5, "max": 0.75}
    )
    assert "| base fp32 | lora_blip | 0.625 | 0.500–0.750 | 2 | 2 | s |" in paths[0].with_suffix(".md").read_text()


def test_the_other_rows_are_kept_if_a_row_fails(tmp_path: Path) -> None:
    def broken():
        yield cell()
        raise RuntimeError("no room")

    path, succeeded = report.collect({"one": broken(), "two": [cell()]}, tmp_path)
    result = json.loads(path.read_text())
    assert not succeeded and len(result["cells"]) == 2 and "no room" in result["failed"]["one"]


@pytest.mark.slow
def test_the_command_runs_the_rows_of_the_flag_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--only", "input", "--out", str(tmp_path)]) == 0
    assert "640 × 480" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--only", "speed"])


def test_bars_show_every_contestant_of_one_step_and_only_ours_of_the_others(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    other = Cell("captions", "base bf16", PEFT, "s", {OURS: [1.0], PEFT: [2.0]})
    result = {"machine": report.machine(), "date": "2026-06-07 12:00", "cells": [cell().as_json(), other.as_json()]}
    everyone, our_bars = bars.groups_of(result, ["step", "captions"], "base fp32").values()
    assert [bar.label for bar in everyone] == [OURS, PEFT, FULL] and [bar.ours for bar in everyone] == [True, False, False]
    assert [(bar.label, bar.ratio["median"]) for bar in our_bars] == [("a step, base bf16", 0.5)]
    assert bars.draw(result, ["step", "captions"], "base fp32", tmp_path / "speed.png").stat().st_size > 1000


def test_the_picture_of_the_docs_shows_the_ranges_of_the_readme_over_the_machines(tmp_path: Path) -> None:
    """At most six bars. The ends of each are values of runs on the three machines, whose results are in benchmarks/results."""
    pytest.importorskip("matplotlib")
    ranges = bars.ranges_of(bars.PAGE.read_text(encoding="utf-8"))
    assert 1 < len(ranges) <= 6 and all(0 < low <= high < 1.5 for low, high in ranges.values())
    readme = (bars.PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    written = [f"{low:.2f}" + f"–{high:.2f}" * (low < high) for low, high in ranges.values()]
    rows = [" | ".join(written[n : n + 2]) for n in (0, 2, 4)]
    for name, row in zip(("BLIP base", "BLIP base, five captions", "tiny base"), rows, strict=True):
        assert f"| {name} | {row} |" in readme
    rows_of = {
        "BLIP base": ("step", "base {}"),
        bars.ROWS[1]: ("captions", "base {}, 2 images × 5 captions"),
        "tiny-blip": ("step", "tiny {}"),
    }
    measured: dict[str, set[float]] = {}
    amd = [f"amd-epyc-2-cores_2026-11-{day}" for day in (21, 29, 30)]
    for file in (*amd, "intel-r-xeon-r-processor-2-cores_2026-11-29"):
        result = json.loads((bars.PAGE.parent.parent / f"benchmarks/results/{file}.json").read_text())
        medians = {(cell["row"], cell["setting"]): cell["ratios"].get(OURS, {}).get("median", 0) for cell in result["cells"]}
        for label in ranges:
            name, _, precision = label.rpartition(", ")
            row, setting = rows_of[name]
            measured.setdefault(label, set()).add(round(medians[row, setting.format(precision)], 2))
    assert ranges == {label: (min(values), max(values)) for label, values in measured.items()}
    assert bars.draw_ranges(ranges, tmp_path / "speed.png").stat().st_size > 1000


@pytest.mark.parametrize("file", ["amd-epyc-2-cores_2026-11-29_2", "intel-r-xeon-r-processor-2-cores_2026-11-29"])
def test_the_other_rows_of_the_docs_are_those_of_the_result_files(file: str) -> None:
    result = json.loads((bars.PAGE.parent.parent / f"benchmarks/results/{file}.json").read_text())
    medians = {
        (cell["setting"], name): round(ratio["median"], 2) for cell in result["cells"] for name, ratio in cell["ratios"].items()
    }
    page, epochs = bars.PAGE.read_text(encoding="utf-8"), (f"{OURS}, first epoch", f"{OURS}, later epochs")
    for setting, count in {"text": 3, "vit[8:12]": 1, "qformer": 1}.items():
        cells = [key for key, name in medians if key.endswith(f"adapters on {setting}") and name == epochs[0]]
        assert len(cells) == count
        for cell in cells:
            assert ", ".join(f"{medians[cell, name]:.2f}" for name in epochs) in page, cell
    merged = f"{OURS}, merged"
    for label, cells in {
        "20 tokens by a merged BLIP base, greedy; `transformers`": [(f"base {p}, beams: 1", merged) for p in ("fp32", "bf16")],
        "an adapter file → merged weights, BLIP large": [("large fp32, load and merge", OURS)],
        "an adapter file → merged weights, BLIP base": [("base fp32, load and merge", OURS)],
    }.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {label} | ") and line.count("|") == 6)
        assert " | ".join(f"{medians[cell]:.2f}" for cell in cells) in line, label


@pytest.mark.parametrize("dtype", ["fp32", "int8", "nf4"])
def test_the_memory_of_a_model_without_weights_is_that_of_the_loaded_model(dtype, tmp_path, monkeypatch):
    """Weights and adapters have the same bytes. What autograd keeps differs by at most 5 %, without the kernels of oneDNN."""
    monkeypatch.setattr(paths.Current, "row", replace(paths.row(), onednn=paths.NEVER, onednn_narrow=paths.NEVER))
    if dtype != "fp32":
        pytest.importorskip("bitsandbytes", reason='bitsandbytes is not installed: pip install "lora_blip[quantized]"')
    expected = memory_table.estimate("BLIP mini", dtype, 2, "fp32")
    loaded = load_backbone(str(sizes.save(backbone("mini"), tmp_path / "base")), "cpu", dtype)
    injection.inject(loaded.model, "vit", r=memory_table.RANK)
    task, side = CaptionTask(loaded), loaded.image_size
    examples = [Example(Path("x.png"), memory_table.TEXT, "x.png", 1)] * 2
    kept = preflight.check_gradients(task, task.batch(HostBatch(examples, torch.randn(2, 3, side, side))))
    assert expected["weights"] == preflight.frozen_bytes(loaded.model)
    assert expected["adapters"] == 16 * sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    assert abs(expected["activations"] / kept - 1) < 0.05 and expected["checkpointed"] < expected["activations"]

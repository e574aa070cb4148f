"""Print what `lora-blip inspect` measured: the facts, a line per part, and lines of the modules with the extreme updates."""

from lora_blip.reports.inspection import AdapterView, Inspection, ModuleView, parts_of
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import printable

BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 16  # singular values of a module that are drawn
LONGEST_NAME = 64  # characters of a module's name; a longer one loses its start
EXTREMES = 3  # modules with the largest updates, and with the smallest, that are printed without --all
READING = "eff. rank: how many of the r directions are used · more in docs/inspect.md"
READING_BASE = "‖ΔW‖/‖W‖: how much the weight changes · intruders: of 10 directions, how many the base does not have · "
READING_PAIRS = "1: both adapters read the same directions of the input; “by chance”: of two random A · docs/inspect.md (φ)"


def printed(inspection: Inspection, every_module: bool = False) -> str:
    """Return the text. Names of modules and values of the header are escaped: an adapter file may be untrusted.

    every_module: print all modules, with the names of the columns above and below them, instead of those with the EXTREMES
    largest and smallest updates.
    """
    lines: list[str] = []
    for view in inspection.adapters:
        lines += [printable(view.path)]
        lines += [printable(f"  {name:<10}{text}") for name, text in view.facts.items()]
        lines += ["", *parts_table(view), "", *modules_table(view, every_module), reading(view), ""]
    if len(inspection.adapters) == 2:
        lines += [*similarity_table(inspection, every_module), READING_PAIRS, ""]
    return "\n".join(lines + [printable(note) for note in inspection.notes])


def reading(view: AdapterView) -> str:
    """Return the line that explains the columns of the modules."""
    return READING_BASE * has_base_of(view) + READING


def has_base_of(view: AdapterView) -> bool:
    """Return True if the base was read."""
    return any(module.relative_norm is not None for module in view.modules)


def shortened_rows(rows: list[str], sizes: list[float], head: str, every_row: bool) -> list[str]:
    """Return the rows under their head: all of them in their order, or those with the largest and smallest sizes, sorted.

    If all are more than twice EXTREMES, the head is repeated below them, because the first one has left the screen.
    """
    if len(rows) <= 2 * EXTREMES:
        return [head, *rows]
    if every_row:
        return [head, *rows, head]
    order = sorted(range(len(rows)), key=lambda n: -sizes[n])
    left_out = len(rows) - 2 * EXTREMES
    largest, smallest = ([rows[n] for n in part] for part in (order[:EXTREMES], order[-EXTREMES:]))
    return [head, *largest, f"… {counted(left_out, 'module')} between, in the page, or with --all", *smallest]


def parts_table(view: AdapterView) -> list[str]:
    """Return a line per part: its share of ‖ΔW‖², and of the parameters."""
    rows = [f"{'part':<16}{'modules':>8}{'parameters':>12}{'share of ‖ΔW‖²':>17}"]
    return rows + [
        f"{part.name:<16}{part.modules:>8}{part.parameters:>12,}{part.share:>17.1%}" for part in parts_of(view.modules)
    ]


def modules_table(view: AdapterView, every_module: bool = False) -> list[str]:
    """Return lines of the modules, as `shortened_rows`. The columns that need the base are left out without it.

    The size of an update is ‖ΔW‖/‖W‖ if the base was read, and otherwise ‖ΔW‖.
    """
    has_base = has_base_of(view)
    names = [shortened(module.address) for module in view.modules]
    width = max(map(len, [*names, "module"])) + 2
    head = f"{'module':<{width}}{'r':>5}{'alpha':>8}{'‖ΔW‖':>10}" + f"{'‖ΔW‖/‖W‖':>11}" * has_base + f"{'eff. rank':>11}"
    head += f"{'intruders':>11}" * has_base + "  singular values"
    rows = [_row(name, module, width, has_base) for name, module in zip(names, view.modules, strict=True)]
    sizes = [(module.relative_norm or 0.0) if has_base else module.norm for module in view.modules]
    return shortened_rows(rows, sizes, head, every_module)


def _row(name: str, module: ModuleView, width: int, has_base: bool) -> str:
    line = f"{name:<{width}}{module.r:>5}{module.alpha:>8g}{module.norm:>10.3g}"
    if has_base:
        line += f"{'–' if module.relative_norm is None else f'{module.relative_norm:.2%}':>11}"
    line += f"{module.effective_rank:>11.2f}"
    if has_base:
        line += f"{'–' if module.intruders is None else module.intruders:>11}"
    return f"{line}  {bars(module.singular_values)}"


def shortened(name: str) -> str:
    """Return a name as text that is safe to print, with at most LONGEST_NAME characters."""
    name = printable(name)
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def bars(values: list[float]) -> str:
    """Return a bar for each of the first singular values, as a share of the largest, and the range of the values."""
    largest = max(values, default=0.0)
    if not largest:
        return "all zero"
    drawn = "".join(BARS[min(7, int(8 * value / largest))] for value in values[:MOST_BARS])
    return f"{drawn}{'…' * (len(values) > MOST_BARS)} {largest:.3g} to {values[-1]:.3g}"


def similarity_table(inspection: Inspection, every_module: bool = False) -> list[str]:
    """Return lines of the modules that both adapters have, as `shortened_rows`, and the others."""
    names = [shortened(pair.address) for pair in inspection.pairs]
    width = max(34, *(len(name) + 2 for name in names), 0)
    head = f"{'subspace similarity of A: module':<{width}}{'first directions':>17}{'all':>7}{'all by chance':>15}"
    rows = [
        f"{name:<{width}}{pair.first:>17.2f}{pair.all:>7.2f}{pair.chance:>15.3f}"
        for name, pair in zip(names, inspection.pairs, strict=True)
    ]
    sizes = [pair.all for pair in inspection.pairs]
    return shortened_rows(rows, sizes, head, every_module) + [printable(line) for line in inspection.alone]

"""Print what `lora-blip inspect` measured: the facts, a line per part, and a line per module."""

from lora_blip.reports.inspection import AdapterView, Inspection, ModuleView, parts_of
from lora_blip.runtime.untrusted import printable

BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 16  # singular values of a module that are drawn
LONGEST_NAME = 64  # characters of a module's name; a longer one loses its start


def printed(inspection: Inspection) -> str:
    """Return the text. Names of modules and values of the header are escaped: an adapter file may be untrusted."""
    lines: list[str] = []
    for view in inspection.adapters:
        lines += [printable(view.path)]
        lines += [printable(f"  {name:<10}{text}") for name, text in view.facts.items()]
        lines += ["", *parts_table(view), "", *modules_table(view), ""]
    if len(inspection.adapters) == 2:
        lines += [*similarity_table(inspection), ""]
    return "\n".join(lines + [printable(note) for note in inspection.notes])


def parts_table(view: AdapterView) -> list[str]:
    """Return a line per part: its share of ‖ΔW‖², and of the parameters."""
    rows = [f"{'part':<16}{'modules':>8}{'parameters':>12}{'share of ‖ΔW‖²':>17}"]
    return rows + [
        f"{part.name:<16}{part.modules:>8}{part.parameters:>12,}{part.share:>17.1%}" for part in parts_of(view.modules)
    ]


def modules_table(view: AdapterView) -> list[str]:
    """Return a line per module. The columns that need the base are left out without it."""
    has_base = any(module.relative_norm is not None for module in view.modules)
    names = [shortened(module.address) for module in view.modules]
    width = max(map(len, [*names, "module"])) + 2
    head = f"{'module':<{width}}{'r':>5}{'alpha':>8}{'‖ΔW‖':>10}" + f"{'‖ΔW‖/‖W‖':>11}" * has_base + f"{'eff. rank':>11}"
    head += f"{'intruders':>11}" * has_base + "  singular values"
    return [head, *(_row(name, module, width, has_base) for name, module in zip(names, view.modules, strict=True))]


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


def similarity_table(inspection: Inspection) -> list[str]:
    """Return a line per module that both adapters have, and the others."""
    names = [shortened(pair.address) for pair in inspection.pairs]
    width = max(map(len, [*names, "module"])) + 2
    rows = [f"{'subspace similarity of A: module':<{max(width, 34)}}{'first directions':>17}{'all':>7}{'by chance':>11}"]
    for name, pair in zip(names, inspection.pairs, strict=True):
        rows.append(f"{name:<{max(width, 34)}}{pair.first:>17.2f}{pair.all:>7.2f}{pair.chance:>11.3f}")
    return rows + [printable(line) for line in inspection.alone]

"""Generate small faults in Python source, which `benchmarks.robustness.mutants` plants one at a time.

`mutations` walks a file's syntax tree and returns every fault of the operators below. A fault is a piece of the source and
the text that replaces it, so that the rest of the file keeps its formatting. Not mutated: docstrings, annotations, text of
messages (`raise`, `print`, `assert`, warnings, f-strings), `__repr__`, and code that only a CUDA or MPS device executes.
"""

import ast
import copy
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
CALCULATED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
DTYPES = {"float32": "float16", "float64": "float32", "float": "half", "double": "float"}  # torch.float32, x.float()
DROPPED = {
    "clone",
    "copy",
    "strip",
    "lower",
    "rstrip",
    "casefold",
    "squeeze",
    "t",
    "abs",
    "reversed",
    "sorted",
}  # x.lower() → x
COMMUTATIVE = {"min", "max", "equal", "gcd"}
KEPT_DECORATORS = {"staticmethod", "classmethod", "property", "contextmanager", "dataclass", "cache", "overload"}
KEPT_KEYWORDS = {
    "strict",
    "non_blocking",
    "check",
    "daemon",
    "indent",
    "encoding",
    "device",
}  # no effect on correct input on a CPU
MESSAGES = {"print", "warn", "warning"}
DEVICES = ("cuda", "mps")


@dataclass(frozen=True)
class Mutant:
    """`source[start:stop]` (in bytes) of `file` becomes `new`."""

    file: str  # path relative to the root of the tree
    function: str  # dotted name; "" at module level
    line: int
    start: int
    stop: int
    new: str
    operator: str
    text: str  # the line of `start`, without indentation
    lines: tuple[int, int]  # first and last line of the statement, or of the part before its body
    name: str = ""  # name in the list of named mutants, or ""

    @property
    def key(self) -> str:
        """Identify the mutant in later versions of the file, as long as its line stays as it is."""
        return f"{self.file} | {self.function} | {self.text} | {self.operator}"

    def rank(self, seed: int) -> str:
        """Return a pseudo-random sort key. A change of one line does not change which mutants of other lines are drawn."""
        return hashlib.sha256(f"{seed} {self.key}".encode()).hexdigest()

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.stop :]

    def diff(self, source: bytes) -> str:
        before, after = (text.decode().splitlines() for text in (source, self.apply(source)))
        lines = list(difflib.unified_diff(before, after, self.file, self.file, n=0, lineterm=""))
        return "\n".join(lines[2:])


def mutations(file: str, source: bytes) -> list[Mutant]:
    """Return every mutant of a file that still compiles, each key once."""
    mutants: dict[str, Mutant] = {}
    counts: dict[str, int] = {}
    walker = _Walker(source)
    walker.visit(ast.parse(source))
    lines = source.decode().splitlines()
    for node, new, operator, function, within in walker.faults:
        start, stop = walker.span(node)
        if source[start:stop].decode() == new:
            continue
        mutant = Mutant(file, function, node.lineno, start, stop, new, operator, lines[node.lineno - 1].strip(), within)
        counts[mutant.key] = counts.get(mutant.key, 0) + 1
        if counts[mutant.key] > 1:  # the same operator twice on one line
            mutant = Mutant(**{**vars(mutant), "operator": f"{operator} #{counts[mutant.key]}"})
        try:
            compile(mutant.apply(source), file, "exec")
        except SyntaxError:
            continue
        mutants[mutant.key] = mutant
    return list(mutants.values())


class _Walker(ast.NodeVisitor):
    """Collect (node, new text, operator, function) for every fault of a file."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.faults: list[tuple[ast.AST, str, str, str, tuple[int, int]]] = []
        self.path: list[str] = []
        self.lines = (0, 0)

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def add(self, node: ast.AST, new: ast.AST | str, operator: str) -> None:
        if isinstance(new, ast.expr):
            new = f"({ast.unparse(new)})" if not isinstance(new, ast.Constant | ast.Name | ast.Call) else ast.unparse(new)
        own = (node.lineno, node.end_lineno) if isinstance(node, ast.Pass) else self.lines
        self.faults.append((node, new, operator, ".".join(self.path), own))

    def visit(self, node: ast.AST) -> None:
        before = self.lines
        if isinstance(node, ast.stmt):
            inner = getattr(node, "body", None)
            self.lines = (node.lineno, max(node.lineno, inner[0].lineno - 1) if inner else node.end_lineno)
        super().visit(node)
        self.lines = before

    def changed(self, node: ast.AST, **fields: object) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    # ---------------------------------------------------------------- where not to look

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in ("__repr__", "__str__", "extra_repr", "__reduce__"):
            return
        for decorator in node.decorator_list:
            name = decorator.func if isinstance(decorator, ast.Call) else decorator
            if (name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")) not in KEPT_DECORATORS:
                self.add(decorator, "(lambda f: f)", f"drop @{ast.unparse(decorator)}")
        self.path.append(node.name)
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self.body(node.body)
        self.path.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.path.append(node.name)
        self.body(node.body)
        self.path.pop()

    def visit_Module(self, node: ast.Module) -> None:
        self.body(node.body)

    def body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
                self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Import(self, node: ast.Import) -> None: ...
    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...
    def visit_Assert(self, node: ast.Assert) -> None: ...
    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    # ---------------------------------------------------------------- statements

    def visit_Expr(self, node: ast.Expr) -> None:
        called = node.value.func if isinstance(node.value, ast.Call) else None
        if isinstance(called, ast.Name | ast.Attribute) and (getattr(called, "id", "") or called.attr) in MESSAGES:
            return
        if isinstance(node.value, ast.Call):
            self.add(node, "pass", "delete call")
        self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        if node.exc:
            self.add(node, "pass", "delete raise")

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets) and self.path:
            self.add(node, "pass", "delete assignment")
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "pass", "delete assignment")
        if type(node.op) in CALCULATED:
            self.add(node, ast.unparse(self.changed(node, op=CALCULATED[type(node.op)]())), "other operator")
        self.visit(node.value)

    def visit_Delete(self, node: ast.Delete) -> None:
        self.add(node, "pass", "delete del")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.add(node, "break", "break")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.add(node, "return None", "return None")
            self.visit(node.value)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is None:
                self.add(item.context_expr, '__import__("contextlib").nullcontext()', "drop with")
            self.visit(item.context_expr)
        self.body(node.body)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        first, last = node.body[0], node.body[-1]
        whole = ast.Pass(
            lineno=first.lineno, col_offset=first.col_offset, end_lineno=last.end_lineno, end_col_offset=last.end_col_offset
        )
        if not isinstance(first, ast.Raise):
            self.add(whole, "raise", "raise again")
        self.body(node.body)

    def visit_If(self, node: ast.If) -> None:
        if not any(word in ast.unparse(node.test) for word in DEVICES):
            self.add(node.test, "True", "if True")
            self.add(node.test, "False", "if False")
            self.visit(node.test)
            self.body(node.body)
        self.body(node.orelse)

    def visit_While(self, node: ast.While) -> None:
        self.add(node.test, "False", "while False")
        self.visit(node.test)
        self.body(node.body)

    # ---------------------------------------------------------------- expressions

    def visit_IfExp(self, node: ast.IfExp) -> None:
        if any(word in ast.unparse(node.test) for word in DEVICES):
            return
        self.add(node, node.body, "always first")
        self.add(node, node.orelse, "always second")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.add(test, "True", "no filter")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, operator in enumerate(node.ops):
            for other in COMPARED[type(operator)]:
                operators = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                self.add(node, self.changed(node, ops=operators), f"{type(operator).__name__} to {other.__name__}")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self.add(node, self.changed(node, op=other), f"{type(node.op).__name__} to {type(other).__name__}")
        for place in range(len(node.values)):
            rest = [*node.values[:place], *node.values[place + 1 :]]
            self.add(node, self.changed(node, values=rest) if len(rest) > 1 else rest[0], f"drop operand {place + 1}")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            self.add(node, node.operand, f"drop {type(node.op).__name__}")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(_is_text(side) for side in (node.left, node.right)) and type(node.op) in CALCULATED:
            other = CALCULATED[type(node.op)]
            self.add(node, self.changed(node, op=other()), f"{type(node.op).__name__} to {other.__name__}")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add(node, str(not value), f"{value} to {not value}")
        elif isinstance(value, int | float):
            for new in (value + 1, value - 1) if isinstance(value, int) else (value * 2 or 1.0, value / 2):
                if new != value:
                    self.add(node, f"({new!r})", f"{value!r} to {new!r}")
        elif isinstance(value, str) and value not in ("", *DEVICES) and len(value.split()) <= 3 and "\n" not in value:
            self.add(node, '""', f"{value!r} emptied")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in DTYPES and not (
            node.attr in ("float", "double")
            and isinstance(node.value, ast.Name | ast.Attribute)
            and ast.unparse(node.value) in ("np", "torch")
        ):
            self.add(node, self.changed(node, attr=DTYPES[node.attr]), f"{node.attr} to {DTYPES[node.attr]}")
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        if (node.lower is not None) + (node.upper is not None) == 2:
            self.add(node, ast.unparse(self.changed(node, lower=None)), "no lower bound")
            self.add(node, ast.unparse(self.changed(node, upper=None)), "no upper bound")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in MESSAGES:
            return
        if isinstance(node.func, ast.Name) and name in NAMES:
            self.add(node.func, NAMES[name], f"{name} to {NAMES[name]}")
        if name in DROPPED and isinstance(node.func, ast.Attribute):
            self.add(node, node.func.value, f"drop .{name}()")
        elif name in DROPPED and node.args:
            self.add(node, node.args[0], f"drop {name}()")
        plain = [x for x in node.args[:2] if not isinstance(x, ast.Starred | ast.GeneratorExp)]
        if (
            len(plain) == 2
            and ast.unparse(plain[0]) != ast.unparse(plain[1])
            and name not in ("isinstance", "getattr", *COMMUTATIVE)
        ):
            self.add(node, self.changed(node, args=[*reversed(plain), *node.args[2:]]), "swap arguments")
        for place, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, *KEPT_KEYWORDS):
                rest = [*node.keywords[:place], *node.keywords[place + 1 :]]
                self.add(node, self.changed(node, keywords=rest), f"drop {keyword.arg}=")
        self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg not in KEPT_KEYWORDS:
                self.visit(keyword.value)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def functions(source: bytes) -> Iterator[tuple[range, range]]:
    """Yield the lines of each function and of its body."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield range(node.lineno, node.end_lineno + 1), range(node.body[0].lineno, node.end_lineno + 1)


def assigned(source: bytes, line: int) -> set[str]:
    """Return the names that the statement of a line assigns, at module level or in a class."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.lineno <= line <= (node.end_lineno or 0):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def uses(source: bytes, names: set[str]) -> set[int]:
    """Return the lines that read one of the names."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in names and isinstance(node.ctx, ast.Load):  # type: ignore[attr-defined]
            lines.add(node.lineno)
    return lines

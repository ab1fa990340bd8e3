"""The house rules, read from the source: which room imports which, what stays light, what no file may hold."""

import ast
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "effitrain"

# A room may import itself and the rooms to its right, except the pairs in APART.
ROOMS = [
    *("cli", "api", "carry_out", "ready", "training", "planning", "report", "evals", "train", "pruning", "adapters"),
    *("model", "stream", "data", "quant", "io", "kernels", "core"),
]
APART = {("train", "pruning")}
KERNELS_MAY_IMPORT = {"effitrain.core.errors"}
CORE_MAY_IMPORT = sys.stdlib_module_names | {"pydantic", "yaml"}
DATA_ROOM = "presets"  # TOML and built-in files: imports nothing of effitrain, every room may read it

LINES, FUNCTION_LINES = 400, 60
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:home|root|work|Users)/\w")


def python_files(*folders: str) -> list[Path]:
    """The sources in ``folders``, sorted; a linked room counts under its real path only."""
    return sorted({path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")})


def text_files() -> Iterator[Path]:
    """Every file a clone holds, data files too."""
    for top in ROOT.iterdir():
        if top.is_file() and top.name != ".git":  # a file in a worktree
            yield top
        elif top.name in {"effitrain", "kernels", "pruning", "scripts", "tests", "benchmarks", ".ci"}:
            yield from (path for path in top.rglob("*") if path.is_file() and path.suffix != ".pyc")


PACKAGE_FILES = python_files("effitrain", "kernels", "pruning")
ALL_FILES = [*PACKAGE_FILES, *python_files("scripts", "tests", "benchmarks"), ROOT / "setup.py"]


def module_name(path: Path) -> str:
    """``kernels/x.py`` and ``effitrain/io/x.py`` as effitrain.kernels.x and effitrain.io.x; a package by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "effitrain" else ("effitrain", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE_FILES}


def imports(source: str, package: str = "") -> Iterator[str]:
    """Dotted names imported anywhere in ``source``, in functions too; ``from a import b`` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> list[str]:
    """What a module of the package imports."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return list(imports(path.read_text(encoding="utf-8"), package))


def room(name: str) -> str:
    """The room of a dotted name in effitrain; the package itself and its front files are ``effitrain``."""
    second = name.split(".")[1] if "." in name else ""
    return second if second in {*ROOMS, DATA_ROOM} else "effitrain"


def forbidden(module: str, target: str) -> str | None:
    """Why ``module`` may not import ``target``, both in effitrain; None where it may."""
    here, there = room(module), room(target)
    if here == "effitrain" or here == there or target == "effitrain.__version__":
        return None
    if here == DATA_ROOM:
        return "presets imports nothing of effitrain"
    if there == "effitrain":
        return "the package's front stands above all rooms"
    if here == "kernels" and not any(target.startswith(allowed) for allowed in KERNELS_MAY_IMPORT):
        return "kernels imports nothing of effitrain but core's errors"
    if there != DATA_ROOM and ROOMS.index(there) < ROOMS.index(here):
        return f"{here} stands below {there}"
    return f"{here} and {there} are apart" if (here, there) in APART else None


def test_no_room_imports_upward_or_sideways():
    wrong = [
        f"{module} imports {target}: {reason}"
        for module in MODULES
        for target in imports_of(module)
        if target.split(".")[0] == "effitrain" and (reason := forbidden(module, target))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("effitrain.cli.run", "effitrain.api.run", True),
        ("effitrain.api", "effitrain.cli.run", False),
        ("effitrain.io.nf4", "effitrain.io.atomic", True),
        ("effitrain.io.nf4", "effitrain.quant.nf4", False),
        ("effitrain.train.loop", "effitrain.pruning.cut", False),
        ("effitrain.pruning.cut", "effitrain.train.loop", False),
        ("effitrain.evals.loss", "effitrain.pruning.cut", True),
        ("effitrain.kernels.rope", "effitrain.core.errors.InputError", True),
        ("effitrain.kernels.rope", "effitrain.core.units", False),
        ("effitrain.core.spec", "effitrain.presets", True),
        ("effitrain.presets", "effitrain.core.units", False),
        ("effitrain.core.spec", "effitrain.run", False),
        ("effitrain.io.nf4", "effitrain", False),
        ("effitrain.io.nf4", "effitrain.__version__", True),
        ("effitrain", "effitrain.api", True),
    ],
)
def test_direction_rule(module, target, allowed):
    assert (forbidden(module, target) is None) == allowed


def test_imports_reads_every_form():
    source = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g.h import i as j\n"
    assert sorted(imports(source, "effitrain.io")) == ["a.b", "c.d", "effitrain.g.h.i", "effitrain.io.e"]


def test_no_circular_import():
    graph = {}
    for module in MODULES:
        targets = {name if name in MODULES else name.rpartition(".")[0] for name in imports_of(module)}
        graph[module] = (targets & set(MODULES)) - {module}
    del graph["effitrain"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_core_is_light():
    wrong = [
        f"{module} imports {target}"
        for module in MODULES
        if room(module) == "core"
        for target in imports_of(module)
        if target.split(".")[0] not in CORE_MAY_IMPORT | {"effitrain"}
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_and_pruning_are_imported_through_the_package():
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in ALL_FILES
        for target in imports(path.read_text(encoding="utf-8"))
        if target.split(".")[0] in {"kernels", "pruning"}
    ]
    assert not wrong, "\n".join(wrong)


def test_links_of_the_rooms_at_the_root():
    for name in ("kernels", "pruning"):
        link = PACKAGE / name
        assert link.is_symlink() and link.readlink() == Path("..", name) and (ROOT / name / "__init__.py").is_file()


def test_kernels_init_is_a_docstring_only():
    body = ast.parse((ROOT / "kernels/__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_every_room_says_what_it_promises():
    missing = [
        module
        for module, path in MODULES.items()
        if path.name == "__init__.py" and module != "effitrain" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not missing
    unknown = {module.split(".")[1] for module in MODULES if "." in module} - {*ROOMS, DATA_ROOM, "__main__"}
    assert not unknown, f"rooms without a place in the import direction: {unknown}"


def without_next_step(source: str) -> Iterator[int]:
    """Lines that make an error for the user which says no next step."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", None) not in ("InputError", "BudgetError"):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        step = keywords.get("next_step", node.args[2] if len(node.args) > 2 else None)
        empty = step is None or (isinstance(step, ast.Constant) and not step.value)
        if empty and not any(isinstance(part, ast.Starred) for part in node.args):
            yield node.lineno


def test_every_error_says_what_to_do():
    bare = {path: list(without_next_step(path.read_text(encoding="utf-8"))) for path in PACKAGE_FILES}
    assert not {str(path): lines for path, lines in bare.items() if lines}
    assert list(without_next_step("InputError('a')\nInputError('a', 'b', '')\nInputError('a', next_step='c')")) == [
        1,
        2,
    ]


def public_parts(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Functions, classes and their methods that anyone may use, by name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                    yield f"{node.name}.{part.name}", part


def raised(function: ast.FunctionDef) -> Iterator[str]:
    """What a function raises itself and does not catch: names of errors, or of functions that make one."""
    left: list[ast.AST] = [*function.body]
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            yield node.exc.func.id
        caught = node.body if isinstance(node, ast.Try) and node.handlers else []
        left += (child for child in ast.iter_child_nodes(node) if child not in caught)


def undocumented(source: str, raises: bool = True) -> Iterator[str]:
    """Public parts of a module without docstring, and errors that a function makes and its docstring does not name.

    A bug's own errors are no part of a contract.
    """
    tree = ast.parse(source)
    if not ast.get_docstring(tree):
        yield "the module"
    for name, node in public_parts(tree):
        said = ast.get_docstring(node)
        if not said:
            yield name
        elif raises and isinstance(node, ast.FunctionDef):
            for error in {*raised(node)} - {"NotImplementedError", "RuntimeError"}:
                if (error if error[0].isupper() else "Error: ") not in said:
                    yield f"{name} raises {error}"


def test_public_docstrings_are_complete():
    """In ``cli`` a docstring is what ``--help`` shows, and every error ends there."""
    found = {
        module: list(undocumented(path.read_text(encoding="utf-8"), room(module) != "cli"))
        for module, path in MODULES.items()
    }
    assert not {module: parts for module, parts in found.items() if parts}


def test_an_incomplete_docstring_is_found():
    said = '"""Said."""'
    source = f"""
{said}
def silent(): pass
def _own(): raise InputError("a")
def bare(x):
    {said}
    raise InputError("a")
def helped(x):
    {said}
    raise _made(x)
def told(x):
    '''Said.

    Raises:
        InputError: a, or b.
    '''
    if x:
        raise InputError("a")
    raise _made(x)
def caught(x):
    {said}
    try:
        raise ValueError("a")
    except ValueError:
        return None
class Kind:
    {said}
    def method(self): pass
    def __len__(self): pass
"""
    assert list(undocumented(source)) == [
        "silent",
        "bare raises InputError",
        "helped raises _made",
        "Kind.method",
    ]
    assert list(undocumented("x = 1")) == ["the module"]


def function_lines(source: str) -> Iterator[tuple[int, str]]:
    """Lines of every function, with its name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, node.name


def test_no_function_is_long():
    found = [
        (lines, f"{path.relative_to(ROOT)}: {name}")
        for path in PACKAGE_FILES
        for lines, name in function_lines(path.read_text(encoding="utf-8"))
    ]
    assert not [place for lines, place in found if lines > FUNCTION_LINES]
    files = [len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE_FILES if path.stem != "__init__"]
    of_files, of_functions = statistics.median(files), statistics.median(lines for lines, _ in found)
    print(f"{len(files)} files, median {of_files:.0f} lines; {len(found)} functions, median {of_functions:.0f} lines")
    assert of_files <= 120 and of_functions <= 12


def test_no_file_is_long():
    sources = [*ALL_FILES, *(ROOT / "scripts").glob("*.sh")]
    long = {str(path.relative_to(ROOT)): n for path in sources if (n := len(path.read_text().splitlines())) >= LINES}
    assert not long


def test_no_file_names_a_path_of_a_machine():
    found = []
    for path in text_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line[:120]}"
            for n, line in enumerate(lines, 1)
            if MACHINE_PATH.search(line)
        ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["/home", "/root", "/work", "/Users"])
def test_machine_path_is_recognised(folder):
    assert MACHINE_PATH.search(f"cd {folder}/someone") and not MACHINE_PATH.search(f"see docs{folder}/someone")


def loaded_modules(code: str) -> set[str]:
    """Top-level modules in memory after ``code`` ran in a new interpreter."""
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code\nprint('\\n', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.rpartition("\n \n")[2].split()}


HEAVY = {"torch", "numpy", "transformers", "datasets", "bitsandbytes", "peft", "matplotlib", "triton"}


@pytest.mark.parametrize(
    "code",
    [
        "import effitrain",
        "import effitrain.cli.main",
        "from effitrain.cli.main import main; sys.argv = ['effitrain', '--help']; main()",
        "from effitrain.cli.main import main; sys.argv = ['effitrain', 'run', '--help']; main()",
    ],
)
def test_starting_up_loads_nothing_heavy(code):
    loaded = loaded_modules(code)
    assert "effitrain" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_answers_in_half_a_second(arguments):
    """Processor time, the best of three: wall time under two test workers measures the other worker."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([Path(sys.executable).with_name("effitrain"), *arguments], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
    assert min(seconds) < 0.5, seconds

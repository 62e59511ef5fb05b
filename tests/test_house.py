"""The rule of the house: imports go down only, inside functions too, and the top of the package stays empty."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "d2g_jax"

FLOORS = (
    ("runtime", "inputs", "config", "results", "report"),
    ("models", "diffusion", "records", "pipeline", "digits", "losses"),
    ("pairs", "lpips_training", "train", "teacher", "metric", "sample", "export", "evaluate"),
    ("demo", "plan", "play", "ablate", "bench"),
    ("commands", "__main__"),
)
WINGS = [wing for floor in FLOORS for wing in floor]
"""From the ground up, in a floor too. A wing may import itself and what stands before it."""

DOOR = "__init__"
"""Hands out a few names of the wings when they are asked for, and stands above all of them."""


def modules(package):
    """Every module with the wing that it stands in."""
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        yield file, parts[0]


def imported(tree):
    """(line, dotted name below the package) of every import of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "d2g_jax":
                    yield node.lineno, DOOR
                elif alias.name.startswith("d2g_jax."):
                    yield node.lineno, alias.name.removeprefix("d2g_jax.")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level
        elif isinstance(node, ast.ImportFrom) and node.module == "d2g_jax":
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d2g_jax."):
            yield node.lineno, node.module.removeprefix("d2g_jax.")


def faults(package, wings=WINGS):
    """What breaks the rule, a line each: file, line and the two wings."""
    found = []
    for file, wing in modules(package):
        name = file.relative_to(package.parent)
        if file.parent == package and wing not in (DOOR, "__main__"):
            found.append(f"{name}: a module at the top of the package; which wing is its?")
            continue
        if wing not in (DOOR, *wings):
            found.append(f"{name}: {wing} is no wing; put it into its place in WINGS")
            continue
        for line, target in imported(ast.parse(file.read_text(encoding="utf-8"))):
            other = target.split(".")[0]
            if not other:
                found.append(f"{name}:{line}: a relative import; name the wing")
            elif wing != DOOR and other == DOOR:
                found.append(f"{name}:{line}: {wing} imports the front door, which stands above it")
            elif wing != DOOR and other in wings and wings.index(other) > wings.index(wing):
                found.append(f"{name}:{line}: {wing} imports {other}, which stands above it")
    return found


def circles(package):
    """Pairs of modules that import each other."""
    trees = {}
    for file, _ in modules(package):
        dotted = ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        trees[dotted] = ast.parse(file.read_text(encoding="utf-8"))
    found = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d2g_jax."):
                module = node.module.removeprefix("d2g_jax.")
                taken = (f"{module}.{alias.name}" for alias in node.names)
                found[name] |= {other if other in trees else module for other in taken}
    return sorted((a, b) for a in found for b in found[a] if a < b and a in found.get(b, ()))


def test_imports_go_down_only():
    assert not faults(PACKAGE)


def test_no_two_modules_import_each_other():
    assert not circles(PACKAGE)


def test_every_wing_says_what_lives_there():
    for wing in WINGS:
        file = PACKAGE / f"{wing}.py" if wing == "__main__" else PACKAGE / wing / "__init__.py"
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"


def test_files_stay_short():
    lines = sorted(len(file.read_text().splitlines()) for file, _ in modules(PACKAGE))
    assert lines[-1] <= 400
    assert lines[len(lines) // 2] <= 130


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("runtime/a.py", "x = 1\nfrom d2g_jax.train import train", "runtime/a.py:2: runtime imports train"),
        ("losses/a.py", "def f():\n    from d2g_jax import sample", "losses/a.py:2: losses imports sample"),
        ("report/a.py", "def f():\n    import d2g_jax.pairs.job as p", "report/a.py:2: report imports pairs"),
        ("runtime/a.py", "from .. import train", "runtime/a.py:1: a relative import"),
        ("report/a.py", "import d2g_jax", "report/a.py:1: report imports the front door"),
        ("loose.py", "", "loose.py: a module at the top"),
        ("drawer/a.py", "", "drawer/a.py: drawer is no wing"),
    ],
)
def test_the_rule_notices(tmp_path, file, text, message):
    path = tmp_path / "d2g_jax" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (fault,) = faults(tmp_path / "d2g_jax")
    assert message in fault


def test_what_is_allowed(tmp_path):
    package = tmp_path / "d2g_jax"
    (package / "train").mkdir(parents=True)
    text = "from d2g_jax.losses import augment\nfrom d2g_jax.train import step\nimport jax"
    (package / "train" / "a.py").write_text(text)
    (package / "__init__.py").write_text("from d2g_jax.commands import common")
    assert not faults(package)


def test_circles_are_noticed(tmp_path):
    package = tmp_path / "d2g_jax" / "train"
    package.mkdir(parents=True)
    (package / "a.py").write_text("from d2g_jax.train.b import B")
    (package / "b.py").write_text("def f():\n    from d2g_jax.train import a")
    assert circles(package.parent) == [("train.a", "train.b")]

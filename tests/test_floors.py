"""The library is a stack of floors: a module imports only what stands below it."""

import ast
import pathlib
import subprocess
import sys

import jaxformer

ROOT = pathlib.Path(jaxformer.__file__).parent
FLOORS = [
    "sharding errors",
    "kernels",
    "ops objectives samplers optim muon lora steps metrics distances probe",
    "layers",
    "models",
    "convert data checkpoint experiment setup start plan hosts program",
]
HEIGHT = {name: i for i, names in enumerate(FLOORS) for name in names.split()}
PROGRAMS = {"train", "evaluate", "configs", "tests"}
NAMES = {"utils", "common", "misc", "base", "core", "helpers"}


def imports(source: str):
    """The modules that a file imports, by full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def reaches_up(floor: str, source: str) -> list[str]:
    """What a module of `floor` imports and may not."""
    wrong = []
    for name in imports(source):
        top, *rest = name.split(".")
        below = rest[0] if rest else None
        if top == "jaxformer" and below in HEIGHT and HEIGHT[below] > HEIGHT[floor]:
            wrong.append(name)
        if top in PROGRAMS:
            wrong.append(name)
    return wrong


def modules():
    return [p for p in ROOT.rglob("*.py") if p.name != "__init__.py" or p.parent != ROOT]


def floor_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_imports_only_point_down():
    assert modules()
    for path in modules():
        assert not reaches_up(floor_of(path), path.read_text()), path


def test_the_readme_shows_every_floor():
    """And of the layers, which have a floor of their own, each."""
    page = (ROOT.parent / "README.md").read_text()
    house = page.split("## The house")[1].split("```")[1].split()
    shown = {word.strip("/,;") for word in house}
    assert set(HEIGHT) <= shown
    assert {p.stem for p in (ROOT / "layers").glob("*.py")} - {"__init__"} <= shown


def test_the_check_itself_sees_a_reach():
    assert reaches_up("ops", "from jaxformer.layers.einsum import Einsum")
    assert reaches_up("ops", "from jaxformer import experiment")
    assert reaches_up("experiment", "import train.run")
    assert not reaches_up("layers", "from jaxformer.ops.mask import Mask")


def test_files_are_short_and_named_after_their_job():
    for path in [p for top in (ROOT, ROOT.parent / "train", ROOT.parent / "evaluate")
                 for p in top.rglob("*.py")]:  # fmt: skip
        assert len(path.read_text().splitlines()) <= 450, path
        assert path.stem not in NAMES, path


def test_below_the_fifth_floor_nothing_reads_the_world():
    world = {"os", "time", "pathlib", "argparse", "absl", "random", "datetime", "io"}
    for path in modules():
        if HEIGHT[floor_of(path)] < 5:
            assert not world & {n.split(".")[0] for n in imports(path.read_text())}, path


def test_no_module_brings_in_tensorflow_or_torch():
    names = [
        ".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        for p in modules()
    ]
    # Also where neither is installed: who asks for them is told on.
    code = (
        "import sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'tensorflow'): print('asked for', name)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {', '.join(names)}"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout == ""

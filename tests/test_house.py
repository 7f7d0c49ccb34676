"""The house: wings are entered through their faces, arrows run one way, scripts stay thin."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

SAE = ROOT / "sae"
WINGS = {"tokens", "training", "samples", "explanations", "report"}
# What stands in a row may import what stands in the rows before it.
FLOORS = [{"tokens"}, {"samples", "training"}, {"explanations"}, {"report", "look"}, {"export"}]
SCRIPTS = sorted(ROOT.glob("*.py"))


def imports(path):
    """The modules of `sae` that a file imports, as dotted names, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where an arrow goes"
            # `from sae.tokens import dataset` reaches the room sae.tokens.dataset, where there is one.
            for alias in node.names:
                room = f"{node.module}.{alias.name}"
                there = ROOT / (room.replace(".", "/") + ".py")
                found.add(room if there.exists() or room.count(".") == 1 else node.module)
    return {name for name in found if name == "sae" or name.startswith("sae.")}


def wing_of(dotted):
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in WINGS | {"export", "look"} else None


def floor(wing):
    return next((number for number, names in enumerate(FLOORS) if wing in names), -1)


def package_files():
    return [(path, wing_of("sae." + path.relative_to(SAE).parts[0].removesuffix(".py")))
            for path in sorted(SAE.rglob("*.py"))]  # fmt: skip


@pytest.mark.parametrize(("path", "wing"), package_files(), ids=lambda value: str(value).split("sae/")[-1])
def test_arrows_run_one_way_and_through_faces(path, wing):
    for name in imports(path):
        other = wing_of(name)
        if other is None or other == wing:
            continue
        assert wing is not None, f"{path.name} is shared by the wings and imports one: {name}"
        assert floor(other) < floor(wing), (path, name)
        assert name.count(".") == 1, f"{path}: {name} is a room of another wing, only its face is open"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_thin_and_use_faces(path):
    assert len(path.read_text().splitlines()) < 120
    for name in imports(path):
        assert not (wing_of(name) and name.count(".") > 1), f"{path.name} imports the room {name}"


def test_each_face_names_what_it_opens():
    for wing in WINGS:
        face = SAE / wing / "__init__.py"
        named = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(face.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        tree = ast.parse(face.read_text()).body
        listed = next(n for n in tree if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        assert set(ast.literal_eval(listed.value)) == named, wing


def test_no_function_is_long():
    for path in sorted(Path(ROOT).glob("*.py")) + sorted(SAE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"

"""Who may import whom, over the source text: direction, cycles, names, and what needs no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import superweights

ROOT = Path(superweights.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
RANKS = {
    "errors": 0,
    "coordinates": 0,
    "progress": 0,
    "checkpoint": 1,
    "quantization": 1,
    "results": 1,
    "model": 2,
    "detection": 3,
    "interventions": 3,
    "measurements": 3,
    "experiments": 4,
    "testing": 4,
    "report": 5,
    "integrations": 5,
    "cli": 6,
    "__main__": 7,
}
BAD_NAMES = {"utils", "helpers", "common", "base", "core", "misc", "manager", "types"}
LOADER_INTERNALS = ("transformers.core_model_loading", "transformers.conversion_mapping", "transformers.modeling_utils")
WITHOUT_TORCH = [
    "superweights",
    "superweights.coordinates",
    "superweights.checkpoint",
    "superweights.checkpoint.opening",
    "superweights.results.records",
    "superweights.results.store",
    "superweights.results.tables",
    "superweights.detection.published",
    "superweights.report.activation_quantization",
    "superweights.report.peaks",
    "superweights.report.weight_quantization",
    "superweights.report.residual",
    "superweights.report.persistence",
    "superweights.report.ablation",
    "superweights.report.comparison",
    "superweights.report.scaling",
    "superweights.report.stop_words",
    "superweights.report.verdicts",
    "superweights.interventions.conditions",
    "superweights.interventions.edit_text",
    "superweights.measurements.intervals",
    "superweights.measurements.texts",
    "superweights.cli",
    "superweights.cli.app",
    "superweights.cli.show",
    "superweights.cli.index",
]


def module_name(file: Path) -> str:
    parts = ("superweights", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def imported(file: Path) -> Iterator[str]:
    """Every module a file imports, wherever the statement stands; names of modules of ours are resolved to them."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where they lead"
            assert node.module is not None
            for each in node.names:
                inside = f"{node.module}.{each.name}"
                yield inside if inside in MODULES else node.module


def own_imports(file: Path) -> set[str]:
    return {each for each in imported(file) if each.split(".")[0] == "superweights"}


def rank(module: str) -> int:
    return RANKS[module.split(".")[1]]


def test_every_part_has_a_rank():
    parts = {name.split(".")[1] for name in MODULES if "." in name}
    assert parts == set(RANKS)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "superweights"])
def test_imports_point_to_lower_ranks(module):
    """Imports for type checking count too. Inside one folder, and between files of rank 0, any direction will do."""
    part = module.split(".")[1]
    for other in own_imports(MODULES[module]) - {"superweights"}:
        assert other in MODULES, f"{module} imports {other}, which is no module"
        assert other.split(".")[1] == part or rank(other) < rank(module) or rank(other) == 0, (
            f"{module} imports {other}"
        )


def test_no_module_imports_the_package_itself():
    """`import superweights` inside would make every module depend on all public ones; the version is data."""
    for module, file in MODULES.items():
        names = [each.name for node in ast.walk(TREES[file])
                 if isinstance(node, ast.ImportFrom) and node.module == "superweights" for each in node.names]  # fmt: skip
        strange = [each for each in names if each != "__version__" and f"superweights.{each}" not in MODULES]
        assert not strange, f"{module} imports {strange} from the package"


def test_no_cycles():
    graph = {
        name: own_imports(file) - {"superweights", name} for name, file in MODULES.items() if name != "superweights"
    }
    while graph:
        free = [name for name, others in graph.items() if not others & graph.keys()]
        assert free, f"these import each other: {sorted(graph)}"
        for name in free:
            del graph[name]


def test_a_file_is_named_for_what_it_holds():
    assert not [file for file in FILES if BAD_NAMES & {file.stem, *file.relative_to(ROOT).parts[:-1]}]


def test_one_file_touches_the_loader_of_transformers():
    touching = {
        name for name, file in MODULES.items() if any(each.startswith(LOADER_INTERNALS) for each in imported(file))
    }
    assert touching == {"superweights.model.streaming"}


def calls(file: Path) -> Iterator[str]:
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


@pytest.mark.parametrize("name", ["print", "input", "eval", "exec"])
def test_never_called(name):
    assert not [module for module, file in MODULES.items() if name in calls(file)]


def test_nothing_is_unpickled():
    for module, file in MODULES.items():
        assert not {"pickle", "dill", "cloudpickle", "joblib"} & set(imported(file)), module
        text = file.read_text()
        assert "torch.load(" not in text, module


@pytest.mark.parametrize("module", ["superweights", "superweights.detection.search"])
def test_importing_says_nothing(module):
    done = subprocess.run([sys.executable, "-W", "error", "-c", f"import {module}"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_needs_no_model_needs_no_torch():
    code = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_TORCH}:\n"
        "    importlib.import_module(name)\n"
        "    found = {'torch', 'transformers'} & set(sys.modules)\n"
        "    assert not found, f'{name} imports {found}'\n"
        "import superweights\n"
        "assert 'find' in superweights.__all__ and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

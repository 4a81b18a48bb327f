"""The shape of the package, as rules that a change can break: who imports whom, sizes, public names, no TensorFlow."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vit_flax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit_flax"
FILES = sorted(PACKAGE.rglob("*.py"))

NUMERIC = {"jax", "flax", "optax", "numpy", "ml_dtypes", "vit_flax.typing"}
WIDE = NUMERIC | {"vit_flax.precision", "vit_flax.tree_paths"}
# Module (or package) -> what it may import besides the standard library.
MAY_IMPORT = {
    "vit_flax.models": NUMERIC | {"vit_flax.models"},
    "vit_flax.losses": NUMERIC,
    "vit_flax.metrics": NUMERIC,
    "vit_flax.augment": NUMERIC,
    "vit_flax.optim": WIDE | {"vit_flax.schedules", "vit_flax.param_groups", "vit_flax.update_rules"},
    "vit_flax.update_rules": WIDE | {"vit_flax.schedules", "vit_flax.param_groups"},
    "vit_flax.schedules": NUMERIC,
    "vit_flax.param_groups": WIDE,
    "vit_flax.step": WIDE,
    "vit_flax.precision": NUMERIC,
    "vit_flax.tree_paths": NUMERIC,
    "vit_flax.sharding": WIDE,
    "vit_flax.config": {"vit_flax.typing", "vit_flax.limits", "ml_collections"},
    "vit_flax.signature": {"vit_flax.config", "vit_flax.limits"},
    "vit_flax.limits": set(),
    "vit_flax.signals": set(),
    "vit_flax.files": set(),
    "vit_flax.log_lines": set(),
    "vit_flax.console": {"rich"},
    "vit_flax.picture_folders": set(),
    "vit_flax.convert": NUMERIC | {"vit_flax.models", "vit_flax.convert", "safetensors", "absl", "rich", "PIL"},
}
MAY_IMPORT["vit_flax.sinks"] = {"numpy", "PIL", "tensorboardX", "wandb", "mlflow", "vit_flax.sinks", "vit_flax.files"}
MAY_IMPORT["vit_flax.report"] = {"absl", "vit_flax.report", "vit_flax.files", "vit_flax.config"}  # reads files only
MAY_IMPORT["vit_flax.pictures"] = {"numpy", "PIL"}
MAY_IMPORT["vit_flax.peak"] = NUMERIC | {"vit_flax.chips"}
MEASURES = {"vit_flax.evals", "vit_flax.hooks", "vit_flax.writer", "vit_flax.train_log", "vit_flax.checkpoint"}
MAY_IMPORT |= {
    name: NUMERIC
    | MEASURES
    | {
        f"vit_flax.{beside}"
        for beside in ("step", "metrics", "sharding", "distributed", "sinks", "pictures", "files", "console")
    }
    | {
        f"vit_flax.{beside}"
        for beside in (
            "checkpoint_record",
            "checksums",
            "tree_paths",
            "retention",
            "orbax_noise",
            "param_groups",
            "optim",
        )
    }
    | {"absl", "etils", "orbax", "rich", "PIL"}
    for name in MEASURES
}
# A run of ours is a source of weights like any other: one file of the converter reads its checkpoints.
MAY_IMPORT["vit_flax.convert.workdir"] = MAY_IMPORT["vit_flax.convert"] | {"vit_flax.checkpoint"}
# The comparison with other libraries imports them, and only inside functions.
MAY_IMPORT["vit_flax.convert.parity"] = MAY_IMPORT["vit_flax.convert"]
IMPORTS_ANYTHING_IN_FUNCTIONS = ("vit_flax.convert.parity",)
# Nothing may import these; they are commands, or known to commands only.
IMPORTED_BY_NOBODY = (
    "vit_flax.main",
    "vit_flax.convert",
    "vit_flax.dry_run",
    "vit_flax.benchmark",
    "vit_flax.predict",
    "vit_flax.reliability",
    "vit_flax.lives",
    "vit_flax.sweep",
)
# A run may start from foreign weights.
STARTS_FROM_CHECKPOINTS = ("vit_flax.finetune",)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_inwards(path):
    name = module_name(path)
    layer = max((layer for layer in MAY_IMPORT if within(name, (layer,))), key=len, default=None)
    if layer is not None:
        top_level_only = within(name, IMPORTS_ANYTHING_IN_FUNCTIONS)
        foreign = {i for i in imports_of(path, top_level_only) if i.split(".")[0] not in sys.stdlib_module_names}
        wrong = {i for i in foreign if not within(i, MAY_IMPORT[layer])}
        assert not wrong, f"{name} is in the layer {layer}, which must not import {sorted(wrong)}"
    if not within(name, IMPORTED_BY_NOBODY) and name not in ("vit_flax", *STARTS_FROM_CHECKPOINTS):
        commands = {i for i in imports_of(path, top_level_only=True) if within(i, IMPORTED_BY_NOBODY)}
        assert not commands, f"{name} imports the command {sorted(commands)}"


def test_what_is_imported_at_the_top_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\[<>=]", line)[0].lower().replace("_", "-") for lines in lists for line in lines}
    packages = importlib.metadata.packages_distributions()
    found = {name.split(".")[0] for path in FILES for name in imports_of(path, top_level_only=True)}
    for name in found - sys.stdlib_module_names - {"vit_flax"}:
        assert declared & {package.lower().replace("_", "-") for package in packages[name]}, name


def test_models_and_data_do_not_know_each_other():
    for path in FILES:
        name = module_name(path)
        if within(name, ("vit_flax.data",)) and path.stem != "show":
            assert not any(
                within(i, ("vit_flax.models", "vit_flax.step", "vit_flax.trainer")) for i in imports_of(path)
            )
            assert not any(within(i, ("jax", "flax")) for i in imports_of(path, top_level_only=True)), name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500, f"{path.name} has outgrown one subject"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            start = (first.end_lineno or 0) if doc else node.lineno
            lines = (node.end_lineno or 0) - start
            assert lines <= 90, f"{path.name}:{node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_public_functions_and_classes_are_documented(path):
    if module_name(path) == "vit_flax.data.pixel_ops":
        return  # two dozen one-liners, named after the published operations; the module's docstring speaks for all
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module_name(path)}.{node.name} has no docstring"


def test_configs_import_ml_collections_and_what_costs_nothing():
    for path in (ROOT / "configs").glob("*.py"):
        foreign = {i for i in imports_of(path) if i.split(".")[0] not in sys.stdlib_module_names}
        assert all(within(i, ("ml_collections", "vit_flax.picture_folders")) for i in foreign), path.name


def test_public_names_resolve_to_what_they_say():
    for name in vit_flax.__all__:
        assert getattr(vit_flax, name).__name__ == name


def test_import_of_the_package_loads_nothing_heavy():
    code = "import sys, vit_flax; print([m for m in ('jax', 'flax', 'grain', 'PIL') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_main_job_needs_neither_tensorflow_nor_torch(tmp_path):
    """Runs the main job's own imports and two of its steps; neither may have been imported by anything."""
    code = """
import sys
from tests.helpers import tiny_config
from vit_flax import train
_, results = train(tiny_config(run__total_steps=3, checkpoint__every_steps=2), sys.argv[1])
assert 'test/top1' in results
assert not {'tensorflow', 'torch'} & set(sys.modules)
print('trained')
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], text=True, cwd=ROOT, capture_output=True)
    assert done.stdout.strip().endswith("trained"), done.stderr[-2000:]


def test_annotated_shapes_are_checked_while_the_tests_run():
    """See conftest.py: without this, a change there could switch the checks off in silence."""
    import jax
    import jax.numpy as jnp
    import jaxtyping

    from tests.tiny_vit import tiny
    from vit_flax.losses import sigmoid_xent

    with pytest.raises(jaxtyping.TypeCheckError):  # of a function
        sigmoid_xent(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones((1, 2), bool), reduction="mean")
    with pytest.raises(jaxtyping.TypeCheckError):  # of a module's method
        jax.eval_shape(tiny().init, jax.random.key(0), jnp.zeros((1, 2, 8, 8, 3)), train=False)


def test_notebooks_for_colab_are_their_text_forms_and_start_from_a_checkout():
    """An installed package has neither configs/ nor tests/golden, which they read."""
    starts = set()
    for path in (ROOT / "experiments" / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert all(cell in path.with_suffix(".py").read_text() for cell in code), f"execute.py --pair: {path.name}"
        starts.add(code[0])
    assert len(starts) == 1
    assert re.search(r'"git", "clone".*os\.chdir\(', starts.pop(), re.DOTALL)

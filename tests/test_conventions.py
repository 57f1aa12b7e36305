"""The rules that hold the house together, checked by reading the code."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import jaxcls

PACKAGE = Path(jaxcls.__file__).parent

# From the ground up. A module imports only from lines above its own and, within a line, from its left.
ORDER = """
errors
storage progress
parallel
predictions
data.images data.download data.source data.lines data.splitting data.lineage data.dataset
data.inventory data.folder data.lists
data.hashing data.alignment data.duplicates
data.pacing data.image_search data.provenance data.gather
data.beneath data.annotations data.moves
preprocess
data.arrayrecord data.tfds
augment.host augment.views augment.ops augment.copies
pipeline resident
evaluation.text evaluation.curves evaluation.intervals evaluation.thresholds evaluation.metrics
evaluation.plots evaluation.neighbours evaluation.label_errors
ui.page ui.thumbnails ui.results ui.report
models.precision models.architecture models.convolution models.normalization
models.normalized_product models.resnet
models.port models.pretrained models.hub models.fold
manifest program
classifier
scoring
feature_cache
cluster.files cluster.session cluster.tables cluster.stages cluster.batch
serving.config serving.wire serving.openapi serving.auth serving.client
serving.admission serving.batcher serving.metrics serving.service serving.app serving.replica serving.ray
serving.registry serving.keeper serving.supervisor serving.local serving.ray_target
serving.deployment
serving.load_test serving.load_generator serving.docker serving.manifests
train.config train.state train.optimizer train.step train.memory train.signals train.checkpoint
train.reporters train.folder
train.setup train.programs train.held_out train.description
train.finetune
svm.samples svm.newton svm.solver svm.calibration svm.cross_validation svm.labels svm.fit
ui.extra ui.app ui.desk ui.review_page ui.widgets
quickstart
commands.base commands.output commands.info commands.gather commands.annotate commands.augment commands.pack
commands.training commands.scoring commands.review commands.thresholds commands.service
cli
""".split()  # noqa: SIM905 - a map, to be read as one

# Package -> what its modules never import, not even inside a function.
FORBIDDEN = {
    "evaluation": ("jax", "flax", "jaxcls.models", "jaxcls.train", "jaxcls.classifier", "sklearn"),
    "data": ("jax", "flax"),
    "preprocess": ("jax", "flax"),
    "augment.host": ("jax", "flax"),
    "predictions": ("jax", "flax"),
    "ui": ("jax", "flax", "jaxcls.models", "jaxcls.train", "jaxcls.classifier"),
    "serving": ("jaxcls.train", "jaxcls.svm"),
    "serving.wire": ("jax", "flax"),
    "serving.client": ("jax", "flax", "starlette", "uvicorn", "jaxcls.scoring", "jaxcls.classifier"),
    "": ("torch", "torchvision", "timm", "transformers", "tensorflow", "pickle"),
}
# Reading a .pth file is the one use of torch.
ALLOWED = {("models.port", "torch")}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    module_name(p): ast.parse(p.read_text("utf-8")) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"
}


MODULE_PATHS = {part for name in MODULES for part in name.split(".")}


def imports(tree: ast.AST) -> set[str]:
    """Full names of everything imported, inside functions too: a from-import gives module and module.name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_upwards(name):
    below = set(ORDER[ORDER.index(name) :])
    imported = {n.removeprefix("jaxcls.") for n in imports(MODULES[name]) if n.startswith("jaxcls.")}
    assert not imported & below


@pytest.mark.parametrize(
    "name", [name for name in ORDER if name != "cli" and not name.startswith("commands.")]
)
def test_the_package_as_a_whole_is_imported_by_the_command_line_alone(name):
    whole = {"jaxcls", *(f"jaxcls.{public}" for public in dir(jaxcls) if public not in MODULE_PATHS)}
    assert not imports(MODULES[name]) & whole


def test_stages_are_counted_alike():
    from jaxcls.models import resnet
    from jaxcls.train import config

    assert config.NUM_STAGES == resnet.NUM_STAGES


def test_modules_are_reached_through_the_package():
    """Each of these in a package that was imported anew, of which nothing else was asked before."""
    paths = [
        "errors",
        "parallel",
        "pipeline",
        "data.images",
        "augment.host",
        "augment.ops",
        "models.port",
        "serving.wire",
        "train.reporters",
        "svm.fit",
        "serving.client",
        "svm.solver",
        "evaluation.thresholds",
        "feature_cache",
        "cluster.batch",
        "serving.manifests",
    ]
    code = f"""
import importlib, sys
for path in {paths}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "jaxcls"]:
        del sys.modules[name]
    module = importlib.import_module("jaxcls")
    for name in path.split("."):
        module = getattr(module, name)
    assert module.__name__ == f"jaxcls.{{path}}"
    print(path)
"""
    assert run(code).split() == paths


@pytest.mark.parametrize("name", ORDER)
def test_forbidden_imports(name):
    for package, forbidden in FORBIDDEN.items():
        if name == package or name.startswith(f"{package}.") or not package:
            for imported in imports(MODULES[name]):
                for bad in forbidden:
                    if (name, bad) not in ALLOWED:
                        assert imported != bad
                        assert not imported.startswith(f"{bad}.")


def test_linen_stays_inside_models():
    users = {name for name, tree in MODULES.items() if "flax.linen" in imports(tree)}
    assert users == {"models.resnet"}


@pytest.mark.parametrize("name", ORDER)
def test_public_names_are_documented_and_named_by_the_rules(name):
    tree = MODULES[name]
    assert ast.get_docstring(tree), f"{name} says what it holds"
    assert name.rpartition(".")[2] not in {"utils", "helpers", "common", "misc"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            enclosing_is_private = any(
                isinstance(outer, ast.ClassDef | ast.FunctionDef)
                and node in ast.walk(outer)
                and outer is not node
                and (outer.name.startswith("_") or isinstance(outer, ast.FunctionDef))
                for outer in ast.walk(tree)
            )
            overrides = (
                name == "train.reporters"
                or (name == "data.source" and node.name == "path")
                or (name.startswith("commands.") and node.name == "run")
            )
            if not enclosing_is_private and not overrides:
                assert ast.get_docstring(node), f"{name}.{node.name} has a docstring"
        if isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert not set(arguments) & {"rng", "rng_key", "prng"}, f"{name}.{node.name}: the name is `key`"


@pytest.mark.parametrize("name", [n for n in dir(jaxcls) if not n.startswith("_")])
def test_public_api_is_documented(name):
    assert getattr(jaxcls, name).__doc__


@pytest.mark.parametrize(
    "name",
    ["read_folder", "scan", "augment_dataset", "load_pretrained", "create_model", "imagenet_classifier",
     "finetune", "fit_svm", "predict", "make_scorer", "extract_features", "evaluate", "load", "load_program"],
)  # fmt: skip
def test_public_functions_state_their_errors(name):
    assert "Raises:" in getattr(jaxcls, name).__doc__


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_quick_and_loads_no_jax():
    code = """
import resource, sys
before = resource.getrusage(resource.RUSAGE_SELF)
import jaxcls
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
assert not {"jax", "sklearn", "matplotlib", "flax", "grain", "ray", "pyarrow"} & set(sys.modules)
"""
    assert min(float(run(code)) for _ in range(3)) < 1


@pytest.mark.parametrize(
    "module",
    [
        "preprocess",
        "augment.host",
        "data.dataset",
        "train.config",
        "serving.client",
        "serving.deployment",
        "cluster.stages",
        "cli",
    ],
)
def test_modules_that_help_loads_are_free_of_jax_and_ray(module):
    loaded = run(f"import sys, jaxcls.{module}; print(*sys.modules)").split()
    assert not {"jax", "ray", "pyarrow"} & set(loaded)


def test_data_workers_are_given_no_jax_by_us():
    """Grain loads it on its own account; for a type checker it may stand in `if TYPE_CHECKING`."""
    statements = [node for node in MODULES["pipeline"].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {n.partition(".")[0] for n in imports(ast.Module(statements, []))} & {"jax", "flax"}


def test_scoring_loads_neither_training_nor_data_pipeline():
    """Each takes a tenth to half a second to load; the first score of a new process would wait for them."""
    loaded = run("import sys, jaxcls; jaxcls.make_scorer, jaxcls.load; print(*sys.modules)").split()
    assert "jax" in loaded
    assert not {"flax", "grain", "orbax", "optax", "sklearn", "matplotlib", "huggingface_hub"} & set(loaded)


def test_lazy_names_resolve():
    for name in dir(jaxcls):
        assert getattr(jaxcls, name) is not None
    assert import_module("jaxcls.evaluation.plots") is jaxcls.evaluation.plots

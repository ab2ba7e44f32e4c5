"""The hard rules of the layout, read off the syntax trees.

A file imports only files that stand before it in ``ORDER``. To add a file, add its name
where its concept belongs; if that breaks an import, a lower concept is missing.
"""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# One line per rank or folder, in the direction in which data flow; within a line, too,
# a file imports only what stands to its left.
ORDER = """
types
_version checks convergence storage randomness metrics data distributed
tracing frozen jacobians probe functional subnetworks likelihoods polya_gamma heteroscedastic targets gpytorch_targets
augmentation: base vectors images orbits patches averaged distances
operators partial_products kernel_tiles tile_products kernel_gradients kernel_operator lazy_covariance shared_covariance features layer_signals layer_features layer_gram spectral stacked_layers draws batch_norm weights prediction
solvers: factors system refinement preconditioners cholesky conjugate_gradients alternating_projections sketch_and_project descent dual_descent stochastic_gradient minibatch_descent choice
matrix_free data_features
kernels: matern buffers batches compositions feature_gram feature random_features tangent error_mixtures dual_activations layer_covariance wide_layer_kinds wide_layers wide_convolutions wide_shapes wide_modules tiled_gram wide_network infinite_width deep exact_features orbit_blocks orbit_exponentials orbit_features orbit_sums patch_kernel patch_sums orbit_kernel invariant convolutional
prior_draws posterior_draws pathwise outcomes predictive_mixture function_draws function_space models inducing_covariances inducing_orbits inducing_strategy centroids inducing_points inducing_gp representers
sampled: observations covariance persistence state gp paths
linearized: weight_blocks curvature_sums factored low_rank curvature_tensors structured_weights structures data_curvature sampling sampled_mode links predictive labels inference g_prior construction loading training_run noise mean conditioning sampled_problem structured_problem problem mode evidence variational posterior calibration curvature_state state persistence classification derived_models gp paths subnetworks continual
dnn: divergence run_key schedules objective checkpoints training_state training initial_weights fit_input fit replica_fit replica_input replica_options stacked_loss stacked_training replicas ensemble_fit priors log_posterior trackers snapshots swag multi_swag point_likelihood scale_tuning ensembles fast_geometric chain_diagnostics slice_sampling curve_ends hamiltonian curves curve_training loss_surface subspace subspace_likelihood subspace_methods subspace_inference subspace_tuning dropout sgmcmc cyclical chain_losses chain_state chains local_reparameterization variational variational_fit planes autoencoder elbo_training deep_gp_layer deep_gp_draws deep_gp_bound deep_gp_predictions deep_gp deep_gp_build deep_gp_fit inducing_posterior latent_processes vae gp_vae gp_vae_fit
selection: mll diagnostics group_dimension gaussian_marginal variational_bound marginal_likelihood outcome_units orders held_out evidence weight_decay elbo sparse_fit multi_start deep_kernel em subset_start evidence_ascent iterative_mll training_batches scale_free weight_optimizer online_evidence online_hyperparameters online_loss online_training online_run curvature_gradient online orbit_jacobians tangent_blocks orbit_likelihood orbit_blocks orbit_sums orbit_curvature invariance_curvatures invariance_timetable invariance_training invariance_fit invariance invariance_starts augerino loss_gradient loss_curvature neumann hypergradient inner_training hypergradient_descent row_augmentation held_out_problem prefix_posteriors prefix_draws speed_bound training_speed ascent named_values scan law_starts kernel_invariance_fit invariance_gp last_layer comparable compare
plots: style bands traces calibration landscape scan
acquisition: ensembles gp_draws draws ranking label_scores fisher bait planning ascent thompson
surrogates: inputs predictions weight_space feasibility encoding recipe training linearized kernels ensembles averages chains recipe_model
testing: modules gradients case posterior state conditioning acquisition model
doctor
"""  # noqa: E501
STRANGERS = {"linearized": "dnn", "dnn": "linearized"}
OPTIONAL = {"matplotlib", "tqdm"}  # may be imported inside a function
FOREIGN = {"torchvision", "torchmetrics", "laplace", "asdl", "backpack"}
ATTICS = ("utils", "helpers", "misc", "common")
FORBIDDEN_CALLS = {
    "pickle.load": "use torch.load with weights_only=True",
    "pickle.loads": "use torch.load with weights_only=True",
    "torch.manual_seed": "take a generator",
    "torch.seed": "take a generator",
    "torch.set_default_dtype": "follow the dtype of the input",
    "torch.set_num_threads": "threads belong to the user",
}
SAMPLERS = {  # of torch; without a generator they move the global random state
    f"torch.{name}"
    for name in (
        "rand randn randint randperm normal bernoulli multinomial poisson "
        "rand_like randn_like randint_like"
    ).split()
}
MAY_CALL_THEM = {"testing"}  # tests that ship: they seed, and pickle their models


def positions(order):
    """Rank of each module by dotted name; a package stands behind its own files."""
    names = []
    for line in order.strip().splitlines():
        folder, colon, files = line.rpartition(":")
        names += [f"{folder}.{name}" if colon else name for name in files.split()]
        names += [folder] if colon else []
    assert len(set(names)) == len(names), "a file is listed twice"
    return {name: rank for rank, name in enumerate([*names, ""])}


RANK = positions(ORDER)
FILES = sorted((ROOT / "gpbridge").rglob("*.py"))


def module_name(path):
    """Dotted name below gpbridge; the empty word is gpbridge itself."""
    parts = path.relative_to(ROOT / "gpbridge").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(node):
    """Absolute dotted names that an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.level:
        return ["a relative import"]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def own_module(name):
    """The module of gpbridge that a dotted name lies in, or None for other packages."""
    root, _, rest = name.partition(".")
    if root != "gpbridge":
        return None
    while rest and rest not in RANK:
        rest = rest.rpartition(".")[0]
    return rest


def violations(name, source):
    """Sentences on the rules that one file breaks."""
    tree = ast.parse(source)
    found = []
    stem = name.rpartition(".")[2].strip("_")
    if stem in ATTICS or stem.endswith(tuple(f"_{attic}" for attic in ATTICS)):
        found.append(f"{stem} names no concept")
    if name not in RANK:
        return [*found, f"{name} has no place in ORDER"]
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    for node in imports:
        for dotted in imported(node):
            where = f"line {node.lineno}"
            target = own_module(dotted)
            folders = name.partition(".")[0], (target or "").partition(".")[0]
            if dotted == "a relative import":
                found.append(f"{where}: a relative import")
            elif target is not None and RANK[target] >= RANK[name]:
                found.append(f"{where}: imports {dotted}, which is not upstream")
            elif target is not None and STRANGERS.get(folders[0]) == folders[1]:
                found.append(f"{where}: {folders[0]} and {folders[1]} are strangers")
            elif dotted.partition(".")[0] in FOREIGN:
                found.append(f"{where}: imports {dotted}, which is not a dependency")
            elif dotted in FORBIDDEN_CALLS:
                found.append(f"{where}: {dotted}; {FORBIDDEN_CALLS[dotted]}")
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if node in imports:
                    roots = {dotted.partition(".")[0] for dotted in imported(node)}
                    if roots - OPTIONAL:
                        found.append(f"line {node.lineno}: import inside a function")
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            dotted = ast.unparse(call.func)
            keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
            ships_tests = name.partition(".")[0] in MAY_CALL_THEM
            if dotted in FORBIDDEN_CALLS and not ships_tests:
                found.append(f"line {call.lineno}: {FORBIDDEN_CALLS[dotted]}")
            if dotted in SAMPLERS and keywords.get("generator", "None") == "None":
                found.append(f"line {call.lineno}: {dotted} without generator=")
            if keywords.get("weights_only", "True") != "True" or (
                dotted == "torch.load" and "weights_only" not in keywords
            ):
                found.append(f"line {call.lineno}: {dotted} without weights_only=True")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "top")
def test_a_file_keeps_the_rules(path):
    assert violations(module_name(path), path.read_text()) == []


def test_every_ranked_file_exists():
    assert set(RANK) == {module_name(path) for path in FILES}


@pytest.mark.parametrize(
    "name, source, message",
    [
        ("checks", "from gpbridge.functional import jvp", "not upstream"),
        ("checks", "import gpbridge.functional", "not upstream"),
        ("checks", "from gpbridge import functional", "not upstream"),
        ("checks", "from gpbridge import LinearizedGP", "not upstream"),
        ("kernels.feature", "from gpbridge.kernels import tangent", "not upstream"),
        ("kernels.tangent", "from gpbridge.kernels import FeatureKernel", "upstream"),
        ("checks", "from .types import Params", "a relative import"),
        ("dnn.fit", "from gpbridge.linearized.gp import LinearizedGP", "strangers"),
        ("linearized.gp", "from gpbridge.dnn import fit_map", "not upstream"),
        ("checks", "def f():\n    import numpy", "inside a function"),
        ("checks", "import torchvision.transforms", "not a dependency"),
        ("checks", "import pickle\npickle.load(file)", "weights_only=True"),
        ("checks", "from pickle import loads", "weights_only=True"),
        ("checks", "torch.load(path)", "without weights_only=True"),
        ("checks", "f(weights_only=False)", "without weights_only=True"),
        ("checks", "torch.manual_seed(0)", "take a generator"),
        ("checks", "torch.randn(3)", "torch.randn without generator="),
        ("checks", "torch.rand(3, generator=None)", "without generator="),
        ("checks", "torch.randperm(3, **options)", "without generator="),
        ("kernels.kernel_utils", "", "names no concept"),
        ("unlisted", "", "has no place in ORDER"),
    ],
)
def test_the_checker_finds_a_violation(name, source, message):
    found = violations(name, source)
    assert found and message in found[0]


@pytest.mark.parametrize(
    "name, source",
    [
        ("kernels.tangent", "from gpbridge.kernels.feature import FeatureKernel"),
        ("linearized.gp", "from gpbridge.kernels import NeuralTangentKernel"),
        ("selection.evidence", "from gpbridge.linearized.gp import LinearizedGP"),
        ("kernels", "from gpbridge.kernels.tangent import NeuralTangentKernel"),
        ("plots", "def f():\n    import matplotlib.pyplot as plt"),
        ("data", "torch.load(path, weights_only=True)\ngenerator.manual_seed(0)"),
        ("data", "torch.rand(3, generator=generator)"),
    ],
)
def test_the_checker_accepts_what_is_allowed(name, source):
    assert violations(name, source) == []


ORACLES = sorted(ROOT.glob("tests/oracles*.py"))


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.stem)
def test_oracles_know_nothing_of_gpbridge(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [dotted for node in imports for dotted in imported(node)]
    assert not [name for name in names if own_module(name) is not None]


def packages():
    folders = {path.parent for path in FILES}
    return [("gpbridge." + module_name(f / "__init__.py")).rstrip(".") for f in folders]


@pytest.mark.parametrize("name", sorted(packages()))
def test_public_names_resolve_and_are_documented(name):
    package = importlib.import_module(name)
    assert package.__doc__ and package.__all__
    for word in package.__all__:
        value = getattr(package, word)
        if inspect.isclass(value):  # the docstring that a class inherits is not its own
            assert vars(value).get("__doc__"), f"{name}.{word} has no docstring"
        else:
            assert value.__doc__, f"{name}.{word} has no docstring"


FRESH_PROCESS = """
import importlib, importlib.abc, json, pkgutil, random, sys
import numpy, torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": repr(numpy.random.get_state()),
        "python generator": repr(random.getstate()),
    }

sys.meta_path.insert(0, Absent())
before = state()
STATEMENT
after = state()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""
STATEMENT = """
import gpbridge
for module in pkgutil.walk_packages(gpbridge.__path__, "gpbridge."):
    importlib.import_module(module.name)
"""


def changed_by(statement, absent):
    """What a statement changes in a fresh process that lacks the absent packages."""
    child = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS.replace("STATEMENT", statement), *absent],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_importing_everything_needs_no_extra_and_changes_no_global_state():
    absent = ["matplotlib", "pandas", "curvlinops", "laplace", "torchvision"]
    assert changed_by(STATEMENT, absent) == []


def test_plots_and_testing_need_no_import_of_their_own():
    statement = """
import gpbridge
assert "gpbridge.testing" not in sys.modules
assert gpbridge.plots.plot_posterior_band
assert gpbridge.testing.assert_module_unchanged
try:
    gpbridge.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
"""
    assert changed_by(statement, ["matplotlib"]) == []


def test_a_change_of_global_state_would_be_seen():
    assert changed_by("torch.rand(1)", []) == ["torch generator"]
    with pytest.raises(AssertionError, match="No module named 'matplotlib'"):
        changed_by("import matplotlib", ["matplotlib"])


def leads_somewhere(dotted):
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        try:
            for part in parts[length:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


def test_names_in_messages_and_docstrings_are_where_they_say():
    names = {
        name
        for path in FILES
        for name in re.findall(r"gpbridge(?:\.[A-Za-z_]+)+", path.read_text())
    }
    assert len(names) > 100
    assert not leads_somewhere("gpbridge.nowhere")
    assert [name for name in sorted(names) if not leads_somewhere(name)] == []

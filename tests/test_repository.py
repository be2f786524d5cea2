"""The walls of the repository: who imports whom, what no code may do, what importing costs, and what set-up says when it cannot go on."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import idefics2_fast

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["idefics2_fast", "kernels", "training", "benchmarks"]  # what is shipped
SOURCES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user would, with the safe path that `make` exports."""
    environment = os.environ | {"PYTHONSAFEPATH": "1"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


# --- who imports whom ---

SEGMENTS = "idefics2_fast.kernels.segments"  # a plain data type, which every room may use
ACCELERATORS = {"flash_attn", "xformers", "liger_kernel"}  # used where installed
NAMES_TRANSFORMERS = {"weights.py", "processor.py", "image_processor.py", "generation_config.py"}  # and the folder patching/


def imports(tree: ast.Module, path: Path) -> Iterator[tuple[str, bool]]:
    """Every dotted name that a module imports, and whether inside a function: at first use and not when the module loads."""
    package = ["idefics2_fast", *path.parent.parts[path.parts[0] == "idefics2_fast" :]]

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        match node:
            case ast.Import():
                yield from ((alias.name, lazy) for alias in node.names)
            case ast.ImportFrom():
                above = package[: len(package) - node.level + 1] if node.level else []
                yield from ((".".join([*above, *filter(None, [node.module]), alias.name]), lazy) for alias in node.names)
            case ast.Call(args=[ast.Constant(value=name), *_]) if ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
                yield name, lazy
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return visit(tree, False)


def within(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def forbidden(path: Path, name: str, lazy: bool) -> bool:
    """Whether the architecture forbids the file at `path` to import `name`."""
    folder, root = path.parts[0], name.split(".")[0]
    if root in {"kernels", "training", "benchmarks", "tests"}:
        return True
    if root == "transformers" and folder != "benchmarks":
        return not lazy or folder != "idefics2_fast" or not (path.name in NAMES_TRANSFORMERS or path.parent.name == "patching")
    if folder == "kernels":
        ours = {"torch", "triton", "numpy"} | sys.stdlib_module_names | (ACCELERATORS if lazy else set())
        return root not in ours and not within(name, "idefics2_fast.kernels")
    if folder == "idefics2_fast":
        kernels = within(name, "idefics2_fast.kernels") and not within(name, SEGMENTS)
        return within(name, "idefics2_fast.training", "idefics2_fast.benchmarks") or (kernels and path.name != "ops.py")
    if folder == "training":
        return within(name, "idefics2_fast.benchmarks") or (within(name, "idefics2_fast.kernels") and not within(name, SEGMENTS))
    return False


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    assert [name for name, lazy in imports(parse(path), path) if forbidden(path, name, lazy)] == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("kernels/linear.py", "import PIL", True),
        ("kernels/linear.py", "from idefics2_fast import config", True),
        ("kernels/linear.py", "from ..config import TextConfig", True),
        ("kernels/linear.py", "import flash_attn", True),
        ("kernels/linear.py", "def f():\n    import flash_attn", False),
        ("kernels/linear.py", "import triton.language as tl, math", False),
        ("kernels/linear.py", "from . import segments", False),
        ("idefics2_fast/vision.py", "from idefics2_fast.kernels import linear", True),
        ("idefics2_fast/vision.py", "from .kernels import linear", True),
        ("idefics2_fast/vision.py", "import_module('idefics2_fast.kernels.linear')", True),
        ("idefics2_fast/vision.py", "from idefics2_fast.kernels.segments import Segments", False),
        ("idefics2_fast/ops.py", "from idefics2_fast.kernels import linear", False),
        ("idefics2_fast/cli.py", "def f():\n    from idefics2_fast import benchmarks", True),
        ("idefics2_fast/model.py", "from idefics2_fast.training import trainer", True),
        ("idefics2_fast/weights.py", "import transformers", True),
        ("idefics2_fast/weights.py", "def f():\n    import transformers", False),
        ("idefics2_fast/generation_config.py", "def f():\n    import transformers", False),
        ("idefics2_fast/model.py", "def f():\n    from transformers import AutoModel", True),
        ("idefics2_fast/patching/vision.py", "import transformers", True),
        ("idefics2_fast/patching/vision.py", "def f():\n    import transformers", False),
        ("idefics2_fast/patching/vision.py", "from idefics2_fast.kernels import linear", True),
        ("idefics2_fast/model.py", "import kernels", True),
        ("training/trainer.py", "from idefics2_fast.benchmarks import harness", True),
        ("training/trainer.py", "from idefics2_fast.kernels.linear import linear", True),
        ("training/trainer.py", "from idefics2_fast import Idefics2", False),
        ("training/trainer.py", "from tests import helpers", True),
        ("benchmarks/demo.py", "import transformers", False),
    ],
)
def test_the_arrows_are_seen(path: str, source: str, expected: bool) -> None:
    found = [forbidden(Path(path), name, lazy) for name, lazy in imports(ast.parse(source), Path(path))]
    assert any(found) == expected


# --- what no code may do ---

MODEL_FILES = {"vision.py", "connector.py", "language.py", "model.py", "ops.py"}
INDEX_NAME = re.compile(r"(_rows|_ids|_index|positions|mask)$")
INDEX_COMMENT = "# indexed without gradient"
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def indexed_with_tensors(tree: ast.Module, lines: list[str]) -> Iterator[str]:
    """Places that index with what is named as a tensor: the backward of that gives other bits in every run on a CPU."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Subscript) or INDEX_COMMENT in "".join(lines[node.lineno - 1 : node.end_lineno]):
            continue
        for index in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            inner = index.operand if isinstance(index, ast.UnaryOp) else index
            if INDEX_NAME.search(getattr(inner, "attr", getattr(inner, "id", ""))):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def unsafe(tree: ast.Module) -> Iterator[str]:
    """Pickles, code from elsewhere, evaluated strings, and scattered writes whose order is left to chance."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec")) | ast.Attribute(attr="index_put" | "index_put_"):
                yield ast.unparse(node)
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save"):
                yield ast.unparse(node)
            case ast.ImportFrom(module="torch") if {"load", "save"} & {alias.name for alias in node.names}:
                yield ast.unparse(node)
            case ast.keyword(arg="trust_remote_code" | "allow_pickle", value=value) if ast.unparse(value) != "False":
                yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_code_is_safe(path: Path) -> None:
    tree = parse(path)
    pickles = [name for name, _ in imports(tree, path) if name.split(".")[0] in PICKLES]
    assert [*unsafe(tree), *pickles] == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "kernels" or path.name in MODEL_FILES], ids=str)
def test_tensors_that_need_gradients_are_not_indexed_with_tensors(path: Path) -> None:
    assert list(indexed_with_tensors(parse(path), (ROOT / path).read_text().splitlines())) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("y = x[image_rows]", True),
        ("y = x[:, batch.token_ids]", True),
        ("x[~mask] = 0", True),
        ("y = x[(\n    answer_rows\n)]", True),
        (f"y = table[positions]  {INDEX_COMMENT}: a constant table", False),
        ("y = x[layer]", False),
        ("y = offsets[1:]", False),
    ],
)
def test_indexing_with_tensors_is_seen(source: str, expected: bool) -> None:
    assert any(indexed_with_tensors(ast.parse(source), source.splitlines())) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("eval('1')", True),
        ("model.eval()", False),
        ("x.index_put_((rows,), y, accumulate=True)", True),
        ("torch.load(path)", True),
        ("from torch import load", True),
        ("safetensors.torch.load(data)", False),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", True),
        ("AutoModel.from_pretrained(path, trust_remote_code=False)", False),
        ("np.load(path, allow_pickle=yes)", True),
    ],
)
def test_unsafe_code_is_seen(source: str, expected: bool) -> None:
    assert any(unsafe(ast.parse(source))) == expected


def test_no_file_names_a_place_on_some_machine() -> None:
    place = re.compile(r"(?<![\w.:/$}])/(work|home|root|opt|Users|mnt)/\w")
    tops = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("*.txt"), ROOT / ".ci" / "run"]
    inner = [path for folder in (*FOLDERS, "csrc", "docs", "tests") for path in (ROOT / folder).rglob("*")]
    paths = [*tops, *(path for path in inner if path.suffix in {".py", ".md", ".cpp", ".hpp", ".json"})]
    assert [f"{path}: {line}" for path in paths for line in path.read_text().splitlines() if place.search(line)] == []


# --- what importing costs, and under which names ---

IMPORT_COST = """
import sys, time, torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in {"transformers", "triton"}, name

sys.meta_path.insert(0, Refuse())
start = time.process_time()
import idefics2_fast
print(time.process_time() - start)
for name in idefics2_fast.__all__:
    getattr(idefics2_fast, name)
"""


def test_importing_is_cheap() -> None:
    """Under 0.3 s of processor time, which other load does not move, more than torch; no name brings transformers or triton along."""
    child = run(sys.executable, "-c", IMPORT_COST)
    assert child.returncode == 0, child.stderr
    assert float(child.stdout) < 0.3


STAND_IN = """
import enum

class LayerRepository:
    def __init__(self, *args, **kwargs):
        pass

CUDAProperties = Device = KernelizeFallback = LocalLayerRepository = ROCMProperties = LayerRepository
Mode = enum.Flag("Mode", "INFERENCE TRAINING TORCH_COMPILE")

def use_kernel_forward_from_hub(*args):
    return lambda decorated: decorated

use_kernelized_func = use_kernel_forward_from_hub
get_kernel = kernelize = register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = None
"""


@pytest.mark.slow
def test_transformers_finds_its_own_kernels_package_from_here(tmp_path: Path) -> None:
    """Hugging Face's `kernels` is not installed with the project: a stand-in of a version that transformers accepts takes its place."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STAND_IN)
    script = "import sys, idefics2_fast.ops, transformers.models.idefics2.modeling_idefics2; print(sys.modules['kernels'].__file__)"
    child = run(sys.executable, "-c", script, PYTHONPATH=str(tmp_path))
    assert child.returncode == 0, child.stderr
    assert Path(child.stdout.strip()) == tmp_path / "kernels" / "__init__.py"


def test_this_process_does_not_see_the_folder_kernels() -> None:
    spec = importlib.util.find_spec("kernels")
    found = {Path(place) for place in spec.submodule_search_locations} if spec else set()
    assert not found & {ROOT / "kernels", ROOT / "tests" / "kernels"}, "run pytest through `make test`, or with PYTHONSAFEPATH=1"


def test_this_checkout_is_what_is_tested() -> None:
    assert Path(idefics2_fast.__file__).parent == ROOT / "idefics2_fast"


# --- set-up ---


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout that is not set up: what the build reads, and nothing else."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc", *FOLDERS):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tmp_path


def python_without(module: str, tmp_path: Path) -> Path:
    """An interpreter that fails to import a module."""
    python = tmp_path / "python-without"
    python.write_text(f'#!/bin/sh\ncase "$2" in *{module}*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("CXX=no-such-compiler", "needs a C++17 compiler: install g++"),
        ("PYTHON=no-such-python", "no-such-python was not found: install Python 3.11"),
        ("PYTHON=false", "false is too old: install Python 3.11"),
        ("ensurepip", "cannot make a virtual environment: install its venv module"),
        ("Python.h", "needs the C headers of"),
    ],
)
def test_make_says_in_one_line_what_is_missing(bare: Path, target: str, missing: str, expected: str) -> None:
    setting = missing if "=" in missing else f"PYTHON={python_without(missing, bare)}"
    child = run("make", "--no-print-directory", target, setting, cwd=bare, MAKEFLAGS="", PYTHON=sys.executable)
    assert child.returncode == 2
    assert (child.stdout, len(child.stderr.splitlines())) == ("", 1)
    assert expected in child.stderr
    assert not (bare / ".venv").exists()


def test_setup_says_in_one_line_that_the_compiler_is_missing(bare: Path) -> None:
    child = run(sys.executable, "setup.py", "--version", cwd=bare, CXX="no-such-compiler")
    assert child.returncode == 1
    assert (child.stdout, len(child.stderr.splitlines())) == ("", 1)
    assert "needs a C++17 compiler: install g++" in child.stderr


@pytest.mark.slow
def test_the_wheel_holds_one_package(bare: Path) -> None:
    """The folders that stand side by side are one package when installed; none of their bare names is taken."""
    child = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".", cwd=bare)
    assert child.returncode == 0, child.stderr
    names = zipfile.ZipFile(next(bare.glob("dist/*.whl"))).namelist()
    version = metadata.version("idefics2-fast")
    assert {name.split("/")[0] for name in names} == {"idefics2_fast", f"idefics2_fast-{version}.dist-info"}
    assert set(names) >= {f"idefics2_fast/{folder}/__init__.py" for folder in FOLDERS[1:]}
    assert any(re.fullmatch(r"idefics2_fast/_C\..*\.so", name) for name in names)
    assert any(name.endswith("/LICENSE") for name in names)


def required(root: str) -> set[str]:
    """Names of all installed distributions that `root` requires, itself included, in normal form."""
    todo, seen = [Requirement(root)], set()
    while todo:
        parent = todo.pop()
        extras = parent.extras or {""}
        if (parent.name, *extras) in seen:
            continue
        seen.add((parent.name, *extras))
        children = map(Requirement, metadata.requires(parent.name) or [])
        todo += [child for child in children if not child.marker or any(child.marker.evaluate({"extra": extra}) for extra in extras)]
    return {canonicalize_name(name) for name, *_ in seen}


@pytest.mark.skipif(Path(sys.prefix).resolve() != ROOT / ".venv", reason="not the environment that make sets up")
def test_every_required_version_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if not line.startswith("#"))}
    tools = {"setuptools", "wheel", "pybind11", "ninja"}
    names = {name for name in required("idefics2-fast[test]") if not name.startswith(("nvidia-", "cuda-"))}  # those torch pins
    installed = {name: metadata.version(name).split("+")[0] for name in (names | tools) - {"idefics2-fast"}}
    assert installed == {name: pins.get(name) for name in installed}

"""Arrows point down, collectives have one caller, and packages export what they say.

Read from the source with `ast`: nothing is imported, so an import inside a function counts too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src"
FILES = sorted((ROOT / "isomoe").rglob("*.py"))
COLLECTIVES = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}

# What each package may import of isomoe; a package that is not listed here may import anything
# but what `FORBIDDEN` says.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "units": set(),
    "http": {"http", "errors"},
    "layout": {"layout", "files", "errors"},
    "comm": {"comm", "layout", "errors"},
    "kernels": {"kernels"},
    "stream": {"comm", "layout", "errors"},
    "blocks": {"blocks", "kernels", "layout", "errors"},
    "models": {"models", "blocks", "stream", "layout", "errors"},
    "weights": {"weights", "blocks", "kernels", "errors"},
}
FORBIDDEN = {"engine": {"prove", "parity", "server", "cli", "bench", "eval"}}
MAY_IMPORT_COMM = {"comm", "stream", "prove", "parity"}
ENGINE_USES_OF_COMM = {
    "engine/worker.py": ("isomoe.comm.",),  # builds the communicator
    "engine/laid_out.py": ("isomoe.comm.deepep.",),
    "engine/worker_process.py": ("isomoe.comm.rendezvous.",),
    "engine/processes.py": ("isomoe.comm.rendezvous.",),
    "bench/comm.py": ("isomoe.comm.measure.",),  # readings of collectives, none of activations
    "cli/bench_comm.py": ("isomoe.comm.measure.",),
    "engine/sampler.py": ("isomoe.comm.Communicator",),  # broadcasts sampled ids: no activation
}


def name_of(file: Path) -> str:
    """Such as `layout/mesh.py`."""
    return file.relative_to(ROOT / "isomoe").as_posix()


def package_of(file: Path) -> str:
    """Such as `layout`; a module of the root counts as a package of its own."""
    return name_of(file).split("/")[0].removesuffix(".py")


def files_of(package: str) -> list[Path]:
    return [file for file in FILES if package_of(file) == package]


def imports(file: Path) -> Iterator[str]:
    """Every absolute name that the file imports, `from a import b` as `a.b`."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    parents = module.split(".")[: -1 if file.name != "__init__.py" else None]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_packages(file: Path) -> set[str]:
    """The packages of isomoe that the file imports."""
    names = (name.split(".") for name in imports(file))
    return {parts[1] for parts in names if parts[0] == "isomoe" and len(parts) > 1}


def test_there_is_something_to_read() -> None:
    assert len(FILES) > 40
    assert {package_of(file) for file in FILES} >= set(ALLOWED)
    assert "isomoe.layout.mesh.Axes" in set(imports(ROOT / "isomoe/comm/base.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    for file in files_of(package):
        assert own_packages(file) <= ALLOWED[package], name_of(file)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_does_not_import_its_customers(package: str) -> None:
    for file in files_of(package):
        assert not own_packages(file) & FORBIDDEN[package], name_of(file)


def test_the_packages_that_are_below_form_no_cycle() -> None:
    below = {package: uses - {package} for package, uses in ALLOWED.items()}
    while below:
        free = {package for package, uses in below.items() if not uses & set(below)}
        assert free, f"a cycle among {sorted(below)}"
        below = {package: uses for package, uses in below.items() if package not in free}


def test_the_layout_algebra_imports_no_torch() -> None:
    for file in files_of("layout"):
        roots = {name.split(".")[0] for name in imports(file)}
        assert not roots & {"torch", "numpy", "transformers", "safetensors"}, name_of(file)


def test_only_comm_imports_torch_distributed() -> None:
    users = {
        name_of(file)
        for file in FILES
        if any(name.startswith("torch.distributed") for name in imports(file))
        or "torch.distributed" in _attributes(file)
    }
    assert {name.split("/")[0] for name in users} == {"comm"}, sorted(users)


def _attributes(file: Path) -> set[str]:
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
    }


def test_only_the_stream_and_those_that_build_a_communicator_import_comm() -> None:
    for file in FILES:
        if package_of(file) in MAY_IMPORT_COMM:
            continue
        used = {name for name in imports(file) if f"{name}.".startswith("isomoe.comm.")}
        allowed = ENGINE_USES_OF_COMM.get(name_of(file), ())
        assert all(name.startswith(allowed) for name in used), (name_of(file), used)


def collective_calls(file: Path) -> set[str]:
    return {
        node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES
    }


def test_only_the_stream_calls_collectives() -> None:
    """Even to name one as an attribute is refused: it could be called under another name."""
    assert collective_calls(ROOT / "isomoe/stream.py") == COLLECTIVES
    for file in FILES:
        if package_of(file) in ("stream", "comm") or name_of(file).startswith("prove/mutants"):
            continue
        assert not collective_calls(file), name_of(file)


PLANNER = {"Plan", "RegimePlan", "make_plan", "cheapest", "regimes", "Move", "Op", "CostModel"}


def test_models_know_neither_the_planner_nor_a_rank() -> None:
    for file in files_of("models"):
        names = set(imports(file))
        assert not any(name.startswith("isomoe.layout.plan") for name in names), name_of(file)
        taken = {name.rpartition(".")[2] for name in names if name.startswith("isomoe.layout.")}
        assert not taken & PLANNER, name_of(file)


RANK_WORDS = {"rank", "size_of", "index", "group", "groups", "stride_of", "shard", "tp_size"}


def test_model_files_do_no_arithmetic_on_ranks_or_sizes_of_groups() -> None:
    """The registry is no model: it tries sizes to advise on them."""
    for file in files_of("models"):
        if file.name == "registry.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.BinOp | ast.Compare | ast.If | ast.IfExp | ast.Subscript):
                tested = node.test if isinstance(node, ast.If | ast.IfExp) else node
                words = {n.attr for n in ast.walk(tested) if isinstance(n, ast.Attribute)}
                assert not words & RANK_WORDS, f"{name_of(file)}: {ast.unparse(tested)}"


PACKAGES = [file for file in FILES if file.name == "__init__.py" and file.parent != ROOT / "isomoe"]


@pytest.mark.parametrize("file", PACKAGES, ids=lambda file: file.parent.name)
def test_a_package_exports_exactly_what_it_imports(file: Path) -> None:
    tree = ast.parse(file.read_text())
    imported = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    ]
    exported: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = ast.literal_eval(node.value)
    assert sorted(exported) == sorted(imported)
    assert len(set(exported)) == len(exported)
    assert ast.get_docstring(tree), "a package says what it is"
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Import, ast.Assign}, "it only re-exports"

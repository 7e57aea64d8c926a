"""Programs outside the package name what the package has, also where they import late."""

import ast
import importlib


def has(module_name, name):
    """Whether a module has an attribute or a submodule of this name."""
    if hasattr(importlib.import_module(module_name), name):
        return True
    try:
        importlib.import_module(f"{module_name}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def test_every_name_that_benchmarks_and_hybridfun_import_exists(repository):
    files = [*repository.glob("benchmarks/**/*.py"), *repository.glob("examples/*.py"), repository / "HybridFun.py"]
    imported = [
        (path.name, node.module, name.name)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fanformer")
        for name in node.names
    ]
    assert len(imported) > 30
    assert [entry for entry in imported if not has(*entry[1:])] == []

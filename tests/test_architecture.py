"""The rules that keep the parts apart: imports run one way, and light processes stay light."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lookonce

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protos", "lookonce", "vision_service", "lm_service", "gateway")
MAY_IMPORT = {
    "protos": {"protos"},
    "lookonce": {"protos", "lookonce"},
    "vision_service": {"protos", "lookonce", "vision_service"},
    "lm_service": {"protos", "lookonce", "lm_service"},
    "gateway": {"protos", "lookonce", "gateway"},
}
SETTINGS_REFERENCE = ROOT / "lookonce/cli/settings_page.py"  # lists every service's settings, so it reads their classes
TO_THREADS = {"submit", "run_in_executor", "run_coroutine_threadsafe"}
TASKS = ROOT / "lookonce/core/tasks.py"
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {("torch", "load"), ("yaml", "load"), ("numpy", "load"), ("np", "load")}


def sources(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name)


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def silent(tree: ast.AST) -> list[int]:
    """Lines that begin a task, or send work to a thread, whose failure nobody need ever hear of."""
    groups = {
        item.optional_vars.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AsyncWith)
        for item in node.items
        if isinstance(item.optional_vars, ast.Name) and "TaskGroup" in ast.unparse(item.context_expr)
    }
    lines = []
    for node in ast.walk(tree):
        dropped = node.value if isinstance(node, ast.Expr) else None
        if isinstance(dropped, ast.Call) and _name(dropped) in TO_THREADS:
            lines.append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        if _name(node) in {"create_task", "ensure_future"} and not (isinstance(owner, ast.Name) and owner.id in groups):
            lines.append(node.lineno)
        if any(keyword.arg == "return_exceptions" for keyword in node.keywords):
            lines.append(node.lineno)
    return lines


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    wrong = []
    for path in sources(package):
        if path == SETTINGS_REFERENCE:
            continue
        tops = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        wrong += [f"{path.relative_to(ROOT)} imports {top}" for top in tops & set(PACKAGES) - MAY_IMPORT[package]]
    assert not wrong


def test_the_import_rule_sees_a_planted_fault():
    tree = ast.parse("def f():\n    from vision_service.images import decode\n")
    assert {name.split(".")[0] for name in imported(tree)} & set(PACKAGES) - MAY_IMPORT["lm_service"]


PLANTED = {
    "core leans on nothing of ours but protos": ("lookonce/core/units.py", "import lookonce.moderation.policy"),
    "models lean on core": ("lookonce/models/devices.py", "import lookonce.moderation.policy"),
    "a family is found by the registry, imported by nobody": (
        "lookonce/models/sizing.py",
        "import lookonce.models.qwen2_vl.config",
    ),
    "moderation leans on core": ("lookonce/moderation/policy/rules.py", "import lookonce.models.registry"),
    "the client leans on errors and the version": ("lookonce/client/request_options.py", "import lookonce.core.stores"),
    "the gateway leans on core, the policy and the judge": ("gateway/auth.py", "import lookonce.models.registry"),
    "services know nothing of each other": ("gateway/auth.py", "import vision_service.settings"),
    "nobody imports the command line": ("lm_service/wire.py", "import lookonce.cli.console"),
    "the command line loads settings of services, nothing else of them": ("lookonce/cli/ask.py", "import gateway.auth"),
    "torch is for models and the model services": ("lookonce/core/record.py", "import torch"),
    "kernels are behind one door": ("lookonce/models/linear.py", "import lookonce.models.kernels.panels"),
    "LLVM is for kernels": ("lookonce/models/compiled.py", "import llvmlite"),
    "torch is for engines within the language service": ("lm_service/prompt.py", "import torch"),
}
"""For each contract of import-linter a module and a line that breaks it."""


def lint_imports(where: Path) -> subprocess.CompletedProcess[str]:
    command = [
        str(Path(sys.executable).parent / "lint-imports"),
        "--no-cache",
        "--config",
        str(where / "pyproject.toml"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(where), "COLUMNS": "200"}
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=180)


def test_import_contracts_hold_and_each_catches_a_planted_violation(tmp_path):
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert {contract["name"] for contract in contracts} == set(PLANTED)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "data", "static")
        )
    clean = lint_imports(tmp_path)
    assert clean.returncode == 0, clean.stdout
    for file, line in PLANTED.values():
        path = tmp_path / file
        path.write_text(path.read_text() + f"\n{line}\n")
    planted = lint_imports(tmp_path)
    broken = {name for name in PLANTED if re.search(rf"^{re.escape(name)} BROKEN", planted.stdout, re.M)}
    assert planted.returncode == 1 and broken == set(PLANTED), planted.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_transformers_models_stay_out(package):
    """Its modelling code costs a process seconds and 150 MB. The unsplit model that `demo` and `verify` hold ours to is
    it, and the general path runs it, in its own folder."""
    found = {
        f"{path.relative_to(ROOT)}"
        for path in sources(package)
        if path.parent != ROOT / "lookonce/models/general"
        for name in imported(ast.parse(path.read_text()))
        if name == "transformers" or name.startswith("transformers.models")
    }
    assert found <= {"lookonce/cli/baseline.py", "lookonce/cli/unsplit.py"}


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks", "deploy", "training", "scripts"])
def test_nothing_unsafe_is_loaded(package):
    wrong = []
    for path in sources(package):
        tree = ast.parse(path.read_text())
        wrong += [f"{path}: {name}" for name in imported(tree) if name.split(".")[0] in FORBIDDEN_MODULES]
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                wrong.append(f"{path}:{node.value.lineno}: trust_remote_code")
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) in FORBIDDEN_CALLS
            ):
                wrong.append(f"{path}:{node.lineno}: {node.value.id}.{node.attr}")
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_no_task_fails_in_silence(package):
    """Tasks begin in lookonce/core/tasks.py, which tells of failures, or in a TaskGroup; work for threads has its
    result taken. Only there are exceptions of tasks gathered as values."""
    wrong = []
    for path in sources(package):
        if path != TASKS:
            wrong += [f"{path.relative_to(ROOT)}:{line}" for line in silent(ast.parse(path.read_text()))]
    assert not wrong


@pytest.mark.parametrize(
    "fault",
    [
        "asyncio.create_task(work())",
        "loop = asyncio.get_running_loop()\nloop.create_task(work())",
        "from asyncio import ensure_future\nensure_future(work())",
        "pool.submit(work)",
        "loop.run_in_executor(None, work)",
        "async def f():\n    await asyncio.gather(*tasks, return_exceptions=True)",
    ],
)
def test_the_rule_of_tasks_sees_a_planted_fault(fault):
    assert silent(ast.parse(fault))
    group = "async def f():\n    async with asyncio.TaskGroup() as group:\n        group.create_task(work())"
    assert not silent(ast.parse(group + "\npool.submit(work).result()"))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_assert_checks_a_request(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not wrong


@pytest.mark.parametrize(
    "module",
    [
        "gateway",
        "gateway.__main__",
        "gateway.http.asgi",
        "lookonce",
        "lookonce.cli",
        "lookonce.core.rpc.client",
        "lookonce.core.stores",
    ],
)
def test_light_modules_leave_torch_out(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'llvmlite') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180, check=True
    )
    assert done.stdout.strip() == "[]"


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    released = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert project["version"] == lookonce.__version__ == released[0]


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [entry for extra in project["optional-dependencies"].values() for entry in extra]
    names = {re.split(r"[<>=;\[ ]", entry)[0].lower().replace("_", "-") for entry in wanted} - {"lookonce"}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().split()
        if "==" in line
    }
    assert names <= pinned

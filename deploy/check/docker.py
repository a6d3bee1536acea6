"""Dockerfiles: hadolint's rules, and ours."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from deploy.check.tools import is_pinned, run

FOLDER = Path("deploy/docker")
PARTS = ("gateway", "vision", "language", "language-vllm")


def check(root: Path) -> Iterator[str]:
    """All Dockerfiles."""
    files = [FOLDER / f"{part}.Dockerfile" for part in PARTS]
    done = run("hadolint", *files, root=root)
    if done.returncode:
        yield from (done.stdout + done.stderr).splitlines()
    groups = tomllib.loads((root / "pyproject.toml").read_text())["dependency-groups"]
    for file in files:
        yield from _rules(root, file, set(groups))


def environment(root: Path, part: str) -> dict[str, str]:
    """The variables that a part's image sets."""
    words = [words for name, words in _instructions(root / FOLDER / f"{part}.Dockerfile") if name == "ENV"]
    return dict(pair.split("=", 1) for line in words for pair in line.split())


def _rules(root: Path, file: Path, groups: set[str]) -> Iterator[str]:
    instructions = _instructions(root / file)
    arguments = {name: value for _, line in instructions if _ == "ARG" for name, _, value in [line.partition("=")]}
    for name, line in instructions:
        if name == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), line.split()[0])
            if not is_pinned(image):
                yield f"{file}: base image {image} is not pinned to a version"
        elif name == "COPY" and not line.startswith("--from="):
            *sources, _ = line.split()
            yield from (f"{file}: COPY of {s}, which is not there" for s in sources if not (root / s).exists())
        elif name == "RUN":
            for group in re.findall(r"--group (\S+)", line):
                if group not in groups:
                    yield f"{file}: pyproject.toml has no dependency group {group}"
            if "compileall" in line:
                yield f"{file}: pip compiles what it installs; compileall fails at files for other Pythons"
    last = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    yield from _runtime(root, file, instructions[last:])


def _runtime(root: Path, file: Path, stage: list[tuple[str, str]]) -> Iterator[str]:
    users = [line for name, line in stage if name == "USER"]
    if not users or not re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", users[-1]):
        yield f"{file}: must end as a numbered user other than root"
    asked = [line for name, line in stage if name == "HEALTHCHECK"]
    if not asked:
        yield f"{file}: has no HEALTHCHECK"
    elif not re.search(r"\$\{LOOKONCE_\w+_(LISTEN|PORT)\}", asked[-1]):
        yield f"{file}: HEALTHCHECK asks at a fixed port, not where the environment lets the service listen"
    entries = [line for name, line in stage if name == "ENTRYPOINT"]
    module = re.search(r'"-m", "(\w+)"', entries[-1] if entries else "")
    if module is None or not (root / module[1] / "__main__.py").is_file():
        yield f"{file}: ENTRYPOINT starts no module of ours"
    if file.name.startswith("gateway") and re.search("torch|cuda", (root / file).read_text().split("\n", 1)[1], re.I):
        yield f"{file}: the gateway's image has no torch"


def _instructions(file: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.M).replace("\\\n", " ")
    parts = (line.strip().split(None, 1) for line in text.splitlines() if line.strip())
    return [(name.upper(), rest) for name, rest in parts]

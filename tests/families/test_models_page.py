"""docs/models.md says what the tests of the families hold, and nothing else."""

from __future__ import annotations

import ast

import pytest
from pydantic import ValidationError

from gateway.schemas.requests import ChatRequest
from lookonce.models.registry import BUILTIN
from tests.families.models_page import COLUMNS, PAGE, declared, page
from tests.processes import ROOT


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run python -m tests.families"


def test_every_family_of_ours_is_on_it():
    assert {one.model_type for _, one in declared()} >= set(BUILTIN)


def run_tests(file):
    """Names of a file's tests that are not skipped."""
    for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text())):
        test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        if test and not any("skip" in ast.unparse(mark) for mark in node.decorator_list):
            yield node.name


@pytest.mark.parametrize("column", COLUMNS)
def test_a_test_holds_every_cell(column):
    for where, one in declared():
        cell = getattr(one, column)
        test = cell if isinstance(cell, str) else cell.test
        file, name = test.split("::") if "::" in test else (where, test)
        assert name in run_tests(file), f"{one.models}, {column}: there is no test {test}"


def test_a_cell_without_a_test_is_seen():
    assert "test_a_cell_without_a_test_is_seen" in run_tests("families/test_models_page.py")
    assert "test_never_written" not in run_tests("families/test_models_page.py")


def test_video_is_no_part_of_a_chat():
    """Of no family."""
    content = [{"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}]
    with pytest.raises(ValidationError, match="audio, files and video are not supported"):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": content}]})

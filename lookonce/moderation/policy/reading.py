"""Reads a policy from YAML.

Read with PyYAML's safe loader into a tree of nodes, from which plain values are made here: every error names its line
and field, and `yes` and `no` stay the words that they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lookonce.core.errors import LookonceError, invalid
from lookonce.moderation.policy.rules import Policy

MAX_FILE_BYTES = 1 << 20
_OTHER_NAME = "categories"
"""What OpenAI's API calls rules; a file may, too."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_NULL = "tag:yaml.org,2002:null"
_TEXTS = {
    "missing": "{field} is required",
    "extra_forbidden": "{field} is unknown",
    "string_type": "{field} must be text",
    "float_type": "{field} must be a number",
    "float_parsing": "{field} must be a number",
    "int_type": "{field} must be a whole number",
    "int_parsing": "{field} must be a whole number",
    "int_from_float": "{field} must be a whole number",
    "list_type": "{field} must be a list",
    "model_type": "{field} must have fields of its own",
    "greater_than": "{field} must be greater than {gt}",
    "greater_than_equal": "{field} must be at least {ge}",
    "less_than_equal": "{field} must be at most {le}",
    "string_too_short": "{field} must not be empty",
    "string_too_long": "{field} must have at most {max_length} characters",
    "string_pattern_mismatch": "{field} must be made of a-z, 0-9, _, - and /, and begin with a letter",
    "too_short": "{field} must have at least {min_length} items",
    "too_long": "{field} must have at most {max_length} items",
    "literal_error": "{field} must be one of {expected}",
}


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises INVALID_ARGUMENT naming the file, the line and the field at fault."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise invalid(f"the policy file {path} cannot be read as UTF-8 text", param="policy") from error
    if len(data) > MAX_FILE_BYTES:
        raise invalid(f"the policy file {path} is larger than {MAX_FILE_BYTES} bytes", param="policy")
    try:
        return parse_policy(text)
    except LookonceError as error:
        raise invalid(f"the policy file {path}, {error.message}", param="policy") from error


def parse_policy(text: str) -> Policy:
    """The policy in YAML. Raises INVALID_ARGUMENT with "line N: " before the field at fault."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise invalid(f"line {mark.line + 1 if mark else 1}: not valid YAML") from error
    except yaml.YAMLError as error:
        raise invalid("line 1: not valid YAML") from error
    if not isinstance(root, yaml.MappingNode):
        raise invalid("line 1: a policy has the field 'rules'")
    tree = _Tree()
    value = tree.read(root, ())
    word = _OTHER_NAME if _OTHER_NAME in value else "rules"
    if word == _OTHER_NAME:
        if "rules" in value:
            line = tree.lines[(_OTHER_NAME,)]
            raise invalid(f"line {line}: '{_OTHER_NAME}' is another name of 'rules': write all under one of them")
        value["rules"] = value.pop(_OTHER_NAME)
    try:
        return Policy.model_validate(value)
    except ValidationError as error:
        raise _explain(error, tree, word) from error


class _Tree:
    """Makes values of nodes and remembers the line of each."""

    def __init__(self) -> None:
        self.lines: dict[tuple[int | str, ...], int] = {}
        self._seen: set[int] = set()

    def read(self, node: yaml.Node, path: tuple[int | str, ...]) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if id(node) in self._seen:
            raise invalid(f"line {line}: aliases (*name) are not taken, write the value again")
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, number)) for number, item in enumerate(node.value)]
        if node.tag in _NUMBERS:
            try:
                return float(node.value)
            except ValueError:
                return node.value
        return None if node.tag == _NULL else node.value

    def _mapping(self, node: yaml.MappingNode, path: tuple[int | str, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise invalid(f"line {line}: a field's name must be plain text")
            if key.value in found:
                raise invalid(f"line {line}: '{key.value}' is there twice")
            self.lines[(*path, key.value)] = line
            found[key.value] = self.read(item, (*path, key.value))
        return found


def _explain(error: ValidationError, tree: _Tree, word: str) -> LookonceError:
    problems: list[Any] = error.errors(include_url=False, include_input=False)
    problem = next((item for item in problems if item["type"] == "extra_forbidden"), problems[0])
    location: tuple[int | str, ...] = problem["loc"]
    if location[:1] == ("rules",):
        location = (word, *location[1:])
    known = location
    while known and known not in tree.lines:
        known = known[:-1]
    where = f"line {tree.lines.get(known, 1)}: "
    field = f"'{'.'.join(map(str, location))}'" if location else "the policy"
    if problem["type"] == "value_error":
        return invalid(f"{where}{field}: {problem['ctx']['error']}")
    text = _TEXTS.get(problem["type"].replace("tuple_type", "list_type"), "{field} has a wrong type or value")
    return invalid(
        where + text.format(field=field, **{k: v for k, v in problem.get("ctx", {}).items() if k != "field"})
    )

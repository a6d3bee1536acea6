"""The policy file: which categories there are, what is asked for each, and from which probability on it is flagged.

Read with PyYAML's safe loader into a tree of nodes, from which plain values are made here: every error names its line,
and `yes` and `no` stay the words that they are. Knows nothing of models and requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from gateway.schemas.base import Body
from lookonce.errors import LookonceError, invalid

MAX_FILE_BYTES = 1 << 20
MAX_CATEGORIES = 256
INPUT = "{input}"
"""In a question: becomes "image" or "text"."""
Severity = Literal["low", "medium", "high", "critical"]
SEVERITIES: tuple[Severity, ...] = ("low", "medium", "high", "critical")
InputType = Literal["image", "text"]
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_NULL = "tag:yaml.org,2002:null"
_TEXTS = {
    "missing": "{field} is required",
    "extra_forbidden": "{field} is unknown",
    "string_type": "{field} must be text",
    "float_type": "{field} must be a number",
    "list_type": "{field} must be a list",
    "model_type": "{field} must have fields of its own",
    "greater_than": "{field} must be greater than {gt}",
    "less_than_equal": "{field} must be at most {le}",
    "string_too_short": "{field} must not be empty",
    "string_too_long": "{field} must have at most {max_length} characters",
    "string_pattern_mismatch": "{field} must be made of a-z, 0-9, _, - and /, and begin with a letter",
    "too_short": "{field} must have at least {min_length} items",
    "too_long": "{field} must have at most {max_length} items",
    "literal_error": "{field} must be one of {expected}",
}

Line = Annotated[str, Field(min_length=1, max_length=2000)]


class Category(Body):
    """One thing to look for."""

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_/-]*$", max_length=64)]
    question: Line  # may hold {input}
    choices: Annotated[tuple[Line, ...], Field(min_length=2, max_length=16)] = ("yes", "no")
    positive: Line = "yes"
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    severity: Severity = "medium"
    applies_to: Annotated[tuple[InputType, ...], Field(min_length=1, max_length=2)] = ("image", "text")
    description: Annotated[str, Field(max_length=2000)] = ""  # what counts, for people
    audience: Annotated[str, Field(max_length=2000)] = ""  # whom the category is for

    @model_validator(mode="after")
    def _agree(self) -> Category:
        if len(set(self.choices)) != len(self.choices):
            raise ValueError("its choices must differ")
        if self.positive not in self.choices:
            raise ValueError(f"positive is {self.positive!r}, which is not among its choices {', '.join(self.choices)}")
        return self

    def ask(self, kind: InputType) -> str:
        """The question about an input of that kind."""
        return self.question.replace(INPUT, kind)


class Policy(Body):
    """All categories of a deployment, in the order of the file."""

    name: Annotated[str, Field(max_length=200)] = ""
    description: Annotated[str, Field(max_length=2000)] = ""
    system: Annotated[str, Field(max_length=8000)] = ""  # said before every question
    categories: Annotated[tuple[Category, ...], Field(min_length=1, max_length=MAX_CATEGORIES)]

    @field_validator("categories")
    @classmethod
    def _distinct(cls, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        seen: set[str] = set()
        for category in categories:
            if category.id in seen:
                raise ValueError(f"the id {category.id!r} is there twice")
            seen.add(category.id)
        return categories

    def of(self, kind: InputType) -> list[Category]:
        """The categories that apply to inputs of that kind."""
        return [category for category in self.categories if kind in category.applies_to]


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
        raise invalid("line 1: a policy has the field 'categories'")
    tree = _Tree()
    value = tree.read(root, ())
    try:
        return Policy.model_validate(value, strict=False)
    except ValidationError as error:
        raise _explain(error, tree) from error


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


def _explain(error: ValidationError, tree: _Tree) -> LookonceError:
    problems: list[Any] = error.errors(include_url=False, include_input=False)
    problem = next((item for item in problems if item["type"] == "extra_forbidden"), problems[0])
    location: tuple[int | str, ...] = problem["loc"]
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

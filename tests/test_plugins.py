"""What is found by name: built in, else installed; imported when chosen, and not before."""

from __future__ import annotations

import sys

from lookonce.core import plugins

GROUP = "lookonce.tests"
BUILTIN = {"one": "plugins_one:VALUE", "stated": "nowhere_at_all:VALUE"}


def install(directory, monkeypatch, points: dict[str, str], modules: dict[str, str]) -> None:
    """What installing a package leaves: modules, and metadata with entry points."""
    metadata = directory / "somebodys-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    for module, text in modules.items():
        (directory / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(directory)


def test_our_own_comes_before_an_installed_one(tmp_path, monkeypatch):
    modules = {"plugins_one": "VALUE = 'ours'\n", "plugins_other": "VALUE = 'theirs'\n"}
    points = {"one": "plugins_other:VALUE", "two": "plugins_other:VALUE"}
    install(tmp_path, monkeypatch, points, modules)
    assert plugins.load(GROUP, "one", BUILTIN) == "ours"
    assert "plugins_other" not in sys.modules
    assert plugins.load(GROUP, "two", BUILTIN) == "theirs"
    assert plugins.load(GROUP, "three", BUILTIN) is None


def test_names_are_listed_without_an_import(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, {"two": "nowhere_either:VALUE"}, {})
    assert plugins.names(GROUP, BUILTIN) == ["one", "stated", "two"]
    assert plugins.names("lookonce.nobody", BUILTIN) == ["one", "stated"]

"""The version of this package; the newest heading of CHANGELOG.md and pyproject.toml say the same."""

__version__ = "0.7.0"

"""Training code for the bundled demonstration checkpoint; not part of the installed package."""

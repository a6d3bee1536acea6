"""Request bodies of the public API. Unknown fields are refused by name."""

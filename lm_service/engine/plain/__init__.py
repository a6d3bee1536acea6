"""The engine for what can't be run packed: one request at a time, by transformers' own way of generating."""

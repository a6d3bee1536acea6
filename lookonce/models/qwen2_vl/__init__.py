"""Qwen2-VL (arXiv:2409.12191): everything that is this family's alone."""

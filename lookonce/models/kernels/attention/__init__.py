"""Attention of a step as compiled code for the CPU at hand."""

"""Matrices that a checkpoint stores quantised: which library's tensors they are, and their values in plain weights.

Importing this package loads no torch: what computes does, when it is called.
"""

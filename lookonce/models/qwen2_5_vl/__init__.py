"""Qwen2.5-VL (arXiv:2502.13923): a tower with window attention before Qwen2-VL's text model, which it shares."""

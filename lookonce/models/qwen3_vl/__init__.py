"""Qwen3-VL (arXiv:2511.21631), dense and with a mixture of experts (`routed`): a tower with learned positions and a
deepstack, before a text model that norms queries and keys."""

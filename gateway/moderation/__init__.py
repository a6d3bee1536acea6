"""Moderation: what an operator's policy asks of a picture or a text, what its answers mean. Knows nothing of HTTP."""

"""The gateway: the public REST API. Never touches tensors, never imports torch."""

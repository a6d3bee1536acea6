"""The engine of embedding models: prompts in, vectors out, nothing decoded."""

"""The language service: answers from image embeddings, without the vision weights."""

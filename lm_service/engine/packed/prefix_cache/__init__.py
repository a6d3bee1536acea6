"""KV of prefixes that several sequences share: a radix tree, and the memory it lies in."""

"""vLLM as an engine: its scheduler, KV and kernels; our prompts, embeddings, answers and scores.

`build` chooses vLLM's arguments and starts it, `engine` is the `Engine`, `requests` says a request in vLLM's words.
`connector` and `worker` run in vLLM's own processes. Imported in vLLM's environment only (scripts/setup_vllm.sh).
"""

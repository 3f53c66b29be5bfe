"""Everything that touches vLLM. The only part of the package that imports vllm or fastapi."""

"""Reading a tenant's adapter with suspicion, and writing the canonical one that vLLM loads."""

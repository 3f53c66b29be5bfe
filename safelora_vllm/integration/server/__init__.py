"""What runs inside vLLM's API server processes: routes, who may call them, and what is served."""

"""Every use of vLLM's internals: as data (`table`), compared at start (`checks`), and done (`worker`)."""

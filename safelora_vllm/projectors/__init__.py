"""Projector caches: reading checkpoints, building a cache from two of them, and using it."""

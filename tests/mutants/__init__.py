"""Mutation testing: ``python -m tests.mutants`` plants small faults and lists those that no fast test sees.

The tool is mutmut. ``modules.toml`` has the modules and their tests; ``equivalent.toml`` the survivors that
change nothing a test could see, each with its reason.
"""

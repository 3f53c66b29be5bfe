"""Makes the guard a condition: ``--worker-extension-cls safelora_vllm.integration.required.Guard``.

vLLM goes on when a plugin cannot be imported, but not when the worker's extension class cannot.
Importing this module installs the guard: that is its only purpose.
"""

from safelora_vllm.integration.plugin import register

register()


class Guard:
    """Adds nothing to the worker; that it could be imported is what counts."""

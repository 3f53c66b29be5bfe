"""``python -m safelora_vllm.cli``: the command without its console script."""

from safelora_vllm.cli.main import entry

if __name__ == "__main__":
    entry()

"""The ``safelora-vllm`` command: one file a command, which parses options and prints, no logic of its own."""

DONE, PROBLEMS, USAGE, REFUSED = 0, 1, 2, 3  # exit codes

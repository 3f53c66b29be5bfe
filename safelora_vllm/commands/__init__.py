"""Subcommands of ``safelora-vllm``, one file each: ``add_parser`` adds the options and the function."""

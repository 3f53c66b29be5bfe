"""The gate as a process of its own beside a vLLM worker, and how to talk to it.

A process, not a thread: a thread would fight the engine's step loop for the interpreter lock, and
a parser that hangs, crashes or runs out of memory would take the engine with it.
"""

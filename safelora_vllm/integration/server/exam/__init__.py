"""The exam in the server: a published copy is asked what the aligned model refuses, before a name serves it.

`safelora_vllm.exam` has what is the same without a server: probes, reference answers, scores and the ladder.
"""

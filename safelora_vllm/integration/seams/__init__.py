"""Every use of vLLM's internals.

`table` lists what the guard holds on to, as data; `checks` compares it with the vLLM of the process.
`kv_connectors` says which outside caches of keys and values a server may have. `worker` is what guards the
processes of an engine, `server` what API servers need. `fixes` mends bugs of vLLM, one file each.
"""

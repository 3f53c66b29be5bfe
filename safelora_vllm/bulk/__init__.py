"""Many adapters through the gate: what is in a folder, in several processes or on a Ray cluster."""

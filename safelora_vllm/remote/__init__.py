"""Adapters from object storage and presigned URLs: which addresses are allowed, and how they are read.

obstore only signs URLs. Every byte comes over a connection of this package, to an address that was checked.
"""

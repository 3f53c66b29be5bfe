"""The page that operators and tenants look at, and the same view of one adapter as a file."""

"""Who callers are, what their keys let them do, and what their quotas leave."""

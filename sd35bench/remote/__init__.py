"""Hosted services as backends: one prediction at a time, paid for once, fetched with suspicion."""

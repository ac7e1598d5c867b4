"""A package that adds a backend, a metric and a prompt set."""

"""The hosted prediction protocol, served over one local backend."""

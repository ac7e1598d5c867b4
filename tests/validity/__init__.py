"""How often the intervals and verdicts are right, measured: the upper part of docs/validity.md."""

"""Measure how Stable Diffusion 3.5 Medium should be run, and show how it is known.

Start at the command line (`sd35bench --help`) or, from Python, at `sd35bench.store.Study` and
`sd35bench.analysis.summary.show_document`.
"""

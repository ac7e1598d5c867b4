"""`compare`: candidate against baseline, figure by figure, to a verdict and an exit code."""

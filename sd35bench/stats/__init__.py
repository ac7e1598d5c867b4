"""Numbers from arrays: intervals, clustered differences, set distances; knows no record."""

"""Studies that tests read: builders, and one that old code wrote."""

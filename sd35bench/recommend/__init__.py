"""`recommend`: from a study's pairs to one setting per profile, with its evidence."""

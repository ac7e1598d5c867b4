"""`claims`: the vendor's statements as designed experiments with corrected verdicts."""

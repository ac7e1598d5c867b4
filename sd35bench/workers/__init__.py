"""Where local trials run: worker processes, and who shares a plan out to them."""

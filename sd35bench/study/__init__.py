"""A study on disk: its journal, images, scores, the view made of them, and what reads them."""

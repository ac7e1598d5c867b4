"""Training of the embedded model.

    python -m sd35bench.nano.train vae|evaluator|transformer|refine|export|measure

Every batch is a pure function of (seed, step), so a run that was killed and resumed computes the
very steps that an uninterrupted one would have.
"""

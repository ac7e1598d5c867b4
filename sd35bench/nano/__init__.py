"""The embedded model: a tiny, trained SD3.5 with a world, a verifier and an evaluator of its own.

`world`, `captions`, `prompts`, `segment` and `verifier` need NumPy and SciPy
only; `networks`, `evaluator` and `train` need torch. `README.md` is the model card.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline's diffusers folder."""

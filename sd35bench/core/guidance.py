"""When guidance acts, as numbers alone: no model, no torch.

Classifier-free guidance moves from the velocity without the prompt towards the one with it,
``empty + cfg (text - empty)``, both made as one batch of two. Skip-layer guidance runs the denoiser
once more with some layers left out and moves away from that worse prediction:
``guided + scale (text - text without the layers)``.
"""


def acting_steps(start: float, stop: float, steps: int) -> tuple[int, ...]:
    """Return the steps, from 0, that skip-layer guidance acts on from `start` until `stop`.

    Both are fractions of the steps. It never acts on the first, and often on none of very few.

    Source: diffusers `StableDiffusion3Pipeline.__call__`, ``should_skip_layers``.
    """
    return tuple(i for i in range(steps) if steps * start < i < steps * stop)


def guided_steps(interval: tuple[float, float], steps: int) -> frozenset[int]:
    """Return the steps, from 0, that classifier-free guidance acts on; the others run batch one.

    `interval`: from and until which fraction of the steps; (0, 1) is always.

    Source: Kynkaanniemi et al. 2024 (arXiv 2404.07724), with steps in place of noise levels.
    """
    low, high = interval
    return frozenset(i for i in range(steps) if low * steps <= i < high * steps)

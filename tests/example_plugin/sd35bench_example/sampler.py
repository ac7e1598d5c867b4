"""A sampler: Euler's steps on Karras's grid of sigmas."""

from sd35bench.evaluations import Sampler


class EulerKarras(Sampler):
    """diffusers' flow-matching Euler with `use_karras_sigmas`."""

    def scheduler(self, own, shift):
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=own.config.num_train_timesteps, shift=shift, use_karras_sigmas=True
        )

"""Text embeddings for models of noise: there are no tokenizers, so a prompt is only a seed.

Either the embeddings themselves are noise of the size that real ones have, and text costs nothing;
or the true encoders run, filled with noise, on random token ids, and text costs what it costs.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sd35bench.architectures import SEED
from sd35bench.core.text import Text

CLIP_STD = 1.0
T5_STD = 0.1
"""T5-XXL's outputs are about a tenth the size of CLIP's hidden states."""

Embeddings = tuple[torch.Tensor, torch.Tensor]


class RandomText(ABC):
    """Stands where diffusers' `encode_prompt` would; the same prompt always gives the same."""

    def encode(self, prompts: Sequence[Text], max_sequence_length: int) -> Embeddings:
        """Embed prompts: [B, CLIP tokens + `max_sequence_length`, width] and pooled [B, pooled]."""
        sources = [_generator(prompt) for prompt in prompts]
        return self._embed(sources, max_sequence_length)

    @abstractmethod
    def _embed(self, sources: list[torch.Generator], t5_tokens: int) -> Embeddings:
        """Embed one prompt per source of randomness."""


class NoiseText(RandomText):
    """Noise in the shape of embeddings; `parts` are the model's configurations."""

    def __init__(self, parts: dict[str, dict[str, Any]], dtype: torch.dtype) -> None:
        """Take the widths from the configurations, as the pipeline would from the encoders."""
        clips = (parts["text_encoder"], parts["text_encoder_2"])
        self._tokens = int(clips[0]["max_position_embeddings"])
        self._clip_width = sum(int(clip["hidden_size"]) for clip in clips)
        self._width = int(parts["transformer"]["joint_attention_dim"])
        self._pooled = int(parts["transformer"]["pooled_projection_dim"])
        self._dtype = dtype

    def _embed(self, sources: list[torch.Generator], t5_tokens: int) -> Embeddings:
        shape = (len(sources), self._tokens + t5_tokens, self._width)
        embeds = torch.zeros(shape, dtype=self._dtype)
        pooled = torch.empty(len(sources), self._pooled, dtype=self._dtype)
        for row, source in enumerate(sources):
            pooled[row] = torch.randn(self._pooled, generator=source) * CLIP_STD
            clip = torch.randn(self._tokens, self._clip_width, generator=source)
            embeds[row, : self._tokens, : self._clip_width] = clip * CLIP_STD
            t5 = torch.randn(t5_tokens, self._width, generator=source)
            embeds[row, self._tokens :] = t5 * T5_STD
        return embeds, pooled


class EncodedText(RandomText):
    """The encoders (CLIP-L, OpenCLIP bigG, T5) on random token ids."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        """Keep the three encoders, which may be moved to a device later."""
        self._clips: Sequence[Any] = encoders[:2]
        self._t5: Any = encoders[2]

    def _embed(self, sources: list[torch.Generator], t5_tokens: int) -> Embeddings:
        clip_ids = [[_clip_ids(clip.config, source) for source in sources] for clip in self._clips]
        t5_ids = [_t5_ids(self._t5.config, source, t5_tokens) for source in sources]
        return self.embed_ids([torch.stack(ids) for ids in clip_ids], torch.stack(t5_ids))

    @torch.no_grad()
    def embed_ids(self, clip_ids: Sequence[torch.Tensor], t5_ids: torch.Tensor) -> Embeddings:
        """Embed token ids ([B, T] per encoder) as diffusers' `encode_prompt` does.

        Source: diffusers `StableDiffusion3Pipeline.encode_prompt`: penultimate hidden states of
        both CLIPs side by side, padded with zeros to T5's width, then T5's; pooled side by side.
        """
        hidden, pooled = [], []
        for clip, ids in zip(self._clips, clip_ids, strict=True):
            output = clip(ids.to(clip.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output[0])
        t5 = self._t5(t5_ids.to(self._t5.device))[0].to(self._t5.dtype)
        clips = torch.cat(hidden, dim=-1)
        padded = nn.functional.pad(clips, (0, t5.shape[-1] - clips.shape[-1]))
        return torch.cat([padded, t5], dim=-2), torch.cat(pooled, dim=-1)


def _generator(prompt: Text) -> torch.Generator:
    return seeded(prompt if isinstance(prompt, str) else "\n".join(prompt.read))


def seeded(name: str) -> torch.Generator:
    """A source of noise named by a text, on the CPU, so that a name means one noise."""
    digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def _clip_ids(config: Any, source: torch.Generator) -> torch.Tensor:
    """Ids [T] between a start and an end token; the pooled output is taken at the end."""
    ids = torch.randint(config.vocab_size - 2, (config.max_position_embeddings,), generator=source)
    ids[0], ids[-1] = config.bos_token_id, config.eos_token_id
    return ids


def _t5_ids(config: Any, source: torch.Generator, tokens: int) -> torch.Tensor:
    ids = torch.randint(2, config.vocab_size, (tokens,), generator=source)
    ids[-1] = config.eos_token_id
    return ids

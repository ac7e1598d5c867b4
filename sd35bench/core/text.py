"""From prompts to embeddings, each prompt once: CLIP-L, OpenCLIP bigG and T5 side by side.

The three encoders cost 2.5 TFLOP for a prompt of 256 T5 tokens, as much as one denoising step at
512 px, and 9.5 GB in half precision are T5's alone. So embeddings are kept by prompt and length:
the negative prompt of a whole study is encoded once, and a prompt that comes again costs nothing if
the caller says so.

Source: diffusers `StableDiffusion3Pipeline.encode_prompt`.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

KEPT = 64
"""Prompts kept: 5.5 MB each in float32 at 77 + 256 tokens of 4,096, 350 MB in all."""

Embeddings = tuple[torch.Tensor, torch.Tensor]


class Encoder(Protocol):
    """Embeds prompts: [B, T, context width] and pooled [B, pooled width]."""

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> Embeddings:
        """Embed `prompts`; T5's part has `max_sequence_length` tokens."""
        ...


class SD3Text:
    """The three encoders with their tokenizers, as transformers loads them; T5 may be missing."""

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[Any], width: int) -> None:
        """`width`: of the joint context, to which CLIP's embeddings are padded."""
        self._tokenizers, self._encoders, self._width = tokenizers, encoders, width

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> Embeddings:
        """Embed `prompts` in one batch."""
        texts = list(prompts)
        length = self._tokenizers[0].model_max_length  # both CLIPs are cut at the first one's
        clips = [
            encoder(self._ids(tokenizer, texts, length, encoder), output_hidden_states=True)
            for tokenizer, encoder in zip(self._tokenizers[:2], self._encoders[:2], strict=True)
        ]
        hidden = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        hidden = nn.functional.pad(hidden, (0, self._width - hidden.shape[-1]))
        pooled = torch.cat([clip[0] for clip in clips], dim=-1)
        t5 = self._encoders[2]
        if t5 is None:
            shape = (len(texts), max_sequence_length, self._width)
            return torch.cat([hidden, hidden.new_zeros(shape)], dim=1), pooled
        ids = self._ids(self._tokenizers[2], texts, max_sequence_length, t5)
        return torch.cat([hidden, t5(ids)[0].to(hidden.dtype)], dim=1), pooled

    @staticmethod
    def _ids(tokenizer: Any, texts: list[str], length: int, encoder: Any) -> torch.Tensor:
        ids = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids.to(encoder.device)


class CachedText:
    """Embeds each prompt once while it is among the last `kept`; counts how often that helped."""

    def __init__(self, encoder: Encoder, kept: int = KEPT) -> None:
        """Wrap `encoder`."""
        self._encoder, self._kept = encoder, kept
        self._known: OrderedDict[tuple[str, int], Embeddings] = OrderedDict()
        self.hits = self.misses = 0

    def encode(self, prompts: Sequence[str], tokens: int, *, keep: bool) -> Embeddings:
        """Embed `prompts`, those that are not known in one batch; `keep` them for later calls."""
        new = [p for p in dict.fromkeys(prompts) if (p, tokens) not in self._known]
        self.misses += len(new)
        self.hits += len(prompts) - len(new)
        fresh: dict[str, Embeddings] = {}
        if new:
            embeds, pooled = self._encoder.encode(new, tokens)
            fresh = {p: (embeds[i], pooled[i]) for i, p in enumerate(new)}
        found = {p: fresh.get(p) or self._known[p, tokens] for p in prompts}
        if keep:
            self._keep(found, tokens)
        pairs = [found[p] for p in prompts]
        return torch.stack([e for e, _ in pairs]), torch.stack([p for _, p in pairs])

    def _keep(self, found: Mapping[str, Embeddings], tokens: int) -> None:
        for prompt, pair in found.items():
            self._known[prompt, tokens] = pair
            self._known.move_to_end((prompt, tokens))
        while len(self._known) > self._kept:
            self._known.popitem(last=False)

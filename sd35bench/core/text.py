"""From prompts to embeddings, each prompt once: CLIP-L, OpenCLIP bigG and T5 side by side.

The three encoders cost 2.5 TFLOP for a prompt of 256 T5 tokens, as much as one denoising step at
512 px, and 9.5 GB in half precision are T5's alone. So embeddings are kept by prompt and length:
the negative prompt of a whole study is encoded once, and a prompt that comes again costs nothing if
the caller says so.

On disk (`DiskCache`) they outlive the process: a second start that asks for the same texts encodes
nothing.

The encoders may read different texts, and words may have weights. A weight w takes a token's
embedding from e to e0 + w (e - e0), where e0 is the empty text's at that place: 0 is as if the word
were not there, 1 changes nothing, bit for bit. It costs one more text, the empty one.

Source: diffusers `StableDiffusion3Pipeline.encode_prompt`; of weights ComfyUI, comfy/sd1_clip.py,
`ClipTokenWeightEncoder.encode_token_weights`, which leaves the pooled embedding as it is, too.
"""

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

KEPT = 64
"""Prompts kept: 5.5 MB each in float32 at 77 + 256 tokens of 4,096, 350 MB in all."""

Embeddings = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Texts:
    """One image's text by encoder (CLIP-L, bigG, T5); `places`: (start, end, weight) in each."""

    read: tuple[str, str, str]
    places: tuple[tuple[tuple[int, int, float], ...], ...] = ((), (), ())


Text = str | Texts
"""A prompt that all encoders read, or one text for each."""


def read_by(text: Text, number: int) -> str:
    """What the encoder of that number reads: 0 is CLIP-L, 1 bigG, 2 T5."""
    return text if isinstance(text, str) else text.read[number]


class Encoder(Protocol):
    """Embeds prompts: [B, T, context width] and pooled [B, pooled width]."""

    def encode(self, prompts: Sequence[Text], max_sequence_length: int) -> Embeddings:
        """Embed `prompts`; T5's part has `max_sequence_length` tokens."""
        ...


class SD3Text:
    """The three encoders with their tokenizers, as transformers loads them; T5 may be missing."""

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[Any], width: int) -> None:
        """`width`: of the joint context, to which CLIP's embeddings are padded."""
        self._tokenizers, self._encoders, self._width = tokenizers, encoders, width

    @torch.inference_mode()
    def encode(self, prompts: Sequence[Text], max_sequence_length: int) -> Embeddings:
        """Embed `prompts` in one batch."""
        length = self._tokenizers[0].model_max_length  # both CLIPs are cut at the first one's
        clips = [self._read(number, prompts, length) for number in (0, 1)]
        hidden = torch.cat([each for each, _ in clips], dim=-1)
        hidden = nn.functional.pad(hidden, (0, self._width - hidden.shape[-1]))
        pooled = torch.cat([first for _, first in clips], dim=-1)
        if self._encoders[2] is None:
            shape = (len(prompts), max_sequence_length, self._width)
            return torch.cat([hidden, hidden.new_zeros(shape)], dim=1), pooled
        t5, _ = self._read(2, prompts, max_sequence_length)
        return torch.cat([hidden, t5.to(hidden.dtype)], dim=1), pooled

    def _read(self, number: int, prompts: Sequence[Text], length: int) -> Embeddings:
        """What one encoder makes of the prompts: [B, T, width], and its first output."""
        texts = [read_by(prompt, number) for prompt in prompts]
        hidden, first = self._run(number, texts, length)
        places = [() if isinstance(p, str) else p.places[number] for p in prompts]
        if any(places):
            empty, _ = self._run(number, [""], length)
            factors = [
                self._factors(number, *each, length) for each in zip(texts, places, strict=True)
            ]
            weights = torch.stack(factors)[..., None].to(hidden)
            hidden = torch.where(weights == 1, hidden, empty + weights * (hidden - empty))
        return hidden, first

    def _run(self, number: int, texts: list[str], length: int) -> Embeddings:
        encoder = self._encoders[number]
        ids = self._tokenizers[number](
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.to(encoder.device)
        if number == 2:
            return (found := encoder(ids)[0]), found
        output = encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    def _factors(
        self, number: int, text: str, places: Sequence[tuple[int, int, float]], length: int
    ) -> torch.Tensor:
        """The weight of each token [T]; CLIP's tokens begin after one that says so."""
        found = torch.ones(length)
        for start, end, weight in places:
            first, last = (self._count(number, text[:at]) for at in (start, end))
            lead = 0 if number == 2 else 1
            found[lead + first : lead + last] = weight
        return found

    def _count(self, number: int, text: str) -> int:
        """Tokens of a text that ends at a word's end, without those that frame it."""
        text = text.rstrip()
        return (
            len(self._tokenizers[number](text, add_special_tokens=False).input_ids) if text else 0
        )


class DiskCache:
    """Embeddings on disk, a file for each text and length, which appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """`folder`: one model's, one dtype's; it may be missing."""
        self._folder = folder

    def get(self, text: Text, tokens: int) -> Embeddings | None:
        """Return what is kept of a text; a file that cannot be read is as good as none."""
        try:
            found = load_file(self._path(text, tokens))
            return found["embeds"], found["pooled"]
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, text: Text, tokens: int, pair: Embeddings) -> None:
        """Keep a text's embeddings; a folder that cannot be written costs only the time."""
        path = self._path(text, tokens)
        temporary = path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = [each.cpu().contiguous().clone() for each in pair]
            save_file({"embeds": whole[0], "pooled": whole[1]}, temporary)
            os.replace(temporary, path)

    def _path(self, text: Text, tokens: int) -> Path:
        name = hashlib.sha256(repr((text, tokens)).encode()).hexdigest()[:24]
        return self._folder / f"{name}.safetensors"


class CachedText:
    """Embeds each prompt once while it is among the last `kept`, or on disk.

    `hits` counts texts that were in memory, `read` those from disk, `misses` those encoded.
    """

    def __init__(self, encoder: Encoder, kept: int = KEPT, disk: DiskCache | None = None) -> None:
        """Wrap `encoder`."""
        self._encoder, self._kept, self._disk = encoder, kept, disk
        self._known: OrderedDict[tuple[Text, int], Embeddings] = OrderedDict()
        self.hits = self.read = self.misses = 0

    def encode(self, prompts: Sequence[Text], tokens: int, *, keep: bool) -> Embeddings:
        """Embed `prompts`, those that are not known in one batch; `keep` them for later calls."""
        new = [p for p in dict.fromkeys(prompts) if (p, tokens) not in self._known]
        self.hits += len(prompts) - len(new)
        fresh = {} if self._disk is None or not keep else self._read(new, tokens)
        new = [p for p in new if p not in fresh]
        self.misses += len(new)
        if new:
            embeds, pooled = self._encoder.encode(new, tokens)
            fresh |= {p: (embeds[i], pooled[i]) for i, p in enumerate(new)}
        found = {p: fresh.get(p) or self._known[p, tokens] for p in prompts}
        if keep:
            self._keep(found, tokens)
        if keep and self._disk is not None:
            for prompt in new:
                self._disk.put(prompt, tokens, fresh[prompt])
        # What was read lies on the CPU, what was encoded where the encoder is.
        device = found[new[0] if new else prompts[0]][0].device
        pairs = [[each.to(device) for each in found[p]] for p in prompts]
        return torch.stack([e for e, _ in pairs]), torch.stack([p for _, p in pairs])

    def _read(self, texts: Sequence[Text], tokens: int) -> dict[Text, Embeddings]:
        assert self._disk is not None
        known = {text: self._disk.get(text, tokens) for text in texts}
        fresh = {text: pair for text, pair in known.items() if pair is not None}
        self.read += len(fresh)
        return fresh

    def _keep(self, found: Mapping[Text, Embeddings], tokens: int) -> None:
        for prompt, pair in found.items():
            self._known[prompt, tokens] = pair
            self._known.move_to_end((prompt, tokens))
        while len(self._known) > self._kept:
            self._known.popitem(last=False)

"""What the backends that run an exported graph share: export, replace, prove.

The denoiser is exported once (`sd35bench.export`), then PyTorch's is dropped before the runtime
reads the graph, so that the two are never in memory together once an artifact is there. Every load
runs the artifact's probe: what the runtime computes here is held against what PyTorch's denoiser
computed at export.
"""

import gc
from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch

from sd35bench import words
from sd35bench.backends.families import family_of
from sd35bench.backends.pipeline import DiffusersBackend, foreign_errors, generator
from sd35bench.errors import BackendError, OptimizationNotApplied, UnsupportedRequest
from sd35bench.export.artifact import Artifact, Recipe
from sd35bench.export.denoiser import INPUTS, OUTPUT, ExportableDenoiser, GraphDenoiser
from sd35bench.export.onnx_model import export_onnx, probe_error
from sd35bench.types import Request

QUANTISATIONS = ("none", "int8")
PARITY = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest relative error on the probe: each dtype's rounding, through all blocks."""
INT8_PARITY = 0.5
"""Beyond this an int8 graph computes something else; how far it drifts is measured on images."""
CALIBRATION_PROMPTS = (
    "a small red circle on a white background",
    "a large blue square on a black background",
    "a green triangle and a yellow circle on a white background",
    "a red square behind a blue circle on a black background",
)
"""What an int8 graph is calibrated on: captions of nano, which mean something to any model."""
CALIBRATION_STEPS = 8
CALIBRATION_CFG = 4.0
MAX_LATENT_SIDE = 32
"""Of the images for it: longer sides would take a full model minutes per image on a CPU."""
FACTS_SHOWN = 8
STORED = ("fp32", "fp16", "bf16", "int8", "uint8")
"""Types of weights; the others are shapes and indices."""

Feeds = Mapping[str, torch.Tensor]


class GraphRuntime(Protocol):
    """A runtime that holds an artifact's graph."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the runtime says about itself, for `in_force`."""
        ...

    def run(self, inputs: Feeds, skip_layers: tuple[int, ...]) -> torch.Tensor:
        """Run the graph without the blocks `skip_layers`: [B, T, p·p·C]."""
        ...


class ExportedBackend(DiffusersBackend):
    """diffusers around a denoiser that runs as an exported graph."""

    options = MappingProxyType({**DiffusersBackend.options, "quantisation": "none", "exclude": ""})
    _engine: GraphRuntime | None = None

    @abstractmethod
    def check(self) -> None:
        """Refuse what cannot be had here, before minutes of export.

        Raises: BackendError (a subclass says which).
        """

    @abstractmethod
    def convert(self, exported: Artifact, feeds: list[dict[str, torch.Tensor]]) -> Artifact:
        """Turn the exported graph into what the engine runs; `feeds` are for calibration."""

    @abstractmethod
    def open(self, artifact: Artifact, width: int) -> GraphRuntime:
        """Load the artifact; `width` is the size p·p·C of an output token."""

    def needs_calibration(self, exported: Artifact) -> bool:
        """Whether `convert` needs inputs of real denoising steps."""
        return False

    @property
    def precision(self) -> str:
        """What the runtime computes in: "fp32", "fp16" or "bf16"."""
        return self._dtype

    def prepare(self, pipe: Any) -> None:
        """Put the exported graph where the transformer was.

        Raises: UnsupportedRequest for a model of another family; OptimizationNotApplied where the
        runtime is not what was asked for; BackendError where nothing can be exported.
        """
        super().prepare(pipe)
        if self._load.model.family != "sd3":
            raise UnsupportedRequest(
                f"backend {self._load.backend.name} exports SD3's denoiser; a model of the family"
                f" {self._load.model.family!r} runs on the eager and compile backends"
            )
        self.check()
        config = pipe.transformer.config
        exported = export_onnx(self.recipe("onnx"), pipe.transformer)
        feeds = self._record(pipe) if self.needs_calibration(exported) else []
        pipe.transformer = GraphDenoiser(pipe.transformer, self._run)  # the weights go here
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._artifact = self.convert(exported, feeds)
        self._engine = self.open(self._artifact, config.patch_size**2 * config.out_channels)
        self._parity = self._prove_parity()

    def recipe(self, runtime: str, quantisation: str = "none") -> Recipe:
        """Return what this load's artifact of `runtime` depends on."""
        model = self._load.model
        return Recipe(
            runtime=runtime,
            model=model.name,
            weights_digest=model.weights_digest,
            layers=model.layers,
            dtype=self._dtype,
            quantisation=quantisation,
            excluded=str(self.asked["exclude"]) if quantisation != "none" else "",
        )

    def prove(self, pipe: Any) -> dict[str, Any]:
        """Add what the runtime says, the artifact and the parity."""
        proven = super().prove(pipe)
        assert self._engine is not None
        facts = self._artifact.facts
        proven["component_dtypes"] = {
            **proven["component_dtypes"],
            "transformer": "+".join(name for name in facts["weights"] if name in STORED),
        }
        proven["artifact"] = {
            "folder": str(self._artifact.folder),
            "digest": self._artifact.manifest["digest"],
            "bytes": self._artifact.bytes,
            "opset": facts["opset"],
            "versions": self._artifact.manifest["versions"],
            "cached": self._artifact.cached,
            "made_s": self._artifact.seconds,
        }
        proven["parity"] = {"relative_max": self._parity, "against": "torch, at export"}
        if "quantised" in facts:
            names = facts["quantised"]
            shown = {"layers": len(names), "names": names[:FACTS_SHOWN]}
            proven["quantised"] = {**shown, "weight_elements": facts["weights"]}
        return {**proven, "attention": f"ONNX opset {facts['opset']}", **self._engine.facts}

    def settle(self) -> None:
        """Read the runtime's facts again: skip-layer guidance may have loaded shorter graphs."""
        super().settle()
        if self._engine is not None:
            self.in_force = {**self.in_force, **self._engine.facts}

    def close(self) -> None:
        """Drop the runtime too."""
        self._engine = None
        super().close()

    def _run(self, inputs: Feeds, skip_layers: tuple[int, ...]) -> torch.Tensor:
        if self._engine is None:
            raise BackendError("this backend is closed; load it again")
        return self._engine.run(inputs, skip_layers)

    def _prove_parity(self) -> float:
        """Run the probe.

        Raises: OptimizationNotApplied where the graph computes something else than PyTorch did,
        or int8 exactly the same.
        """

        def forward(inputs: Feeds) -> torch.Tensor:
            return self._run({name: value.to(self.device) for name, value in inputs.items()}, ())

        error = probe_error(self._artifact.folder, forward)
        quantised = self.asked["quantisation"] == "int8"
        limit = INT8_PARITY if quantised else PARITY[self.precision]
        if not error <= limit:
            raise OptimizationNotApplied(
                f"the exported denoiser differs from PyTorch's by {words.digits(error, 2)} of its"
                f" largest value, more than {limit:g}: this runtime computes something else"
            )
        if quantised and error <= PARITY["fp32"]:
            raise OptimizationNotApplied(
                "quantisation=int8 asked, but outputs differ from PyTorch's by only"
                f" {words.digits(error, 2)}: nothing was computed in int8"
            )
        return error

    def _record(self, pipe: Any) -> list[dict[str, torch.Tensor]]:
        """Inputs of the graph at each step of a few images, and PyTorch's answers."""
        transformer, feeds = pipe.transformer, []
        module = ExportableDenoiser(transformer).eval()

        def run(inputs: Feeds, _: tuple[int, ...]) -> torch.Tensor:
            output = module(*(inputs[name] for name in INPUTS))[0]
            feeds.append({**inputs, OUTPUT: output})
            return output

        config = transformer.config
        side = min(int(config.sample_size), MAX_LATENT_SIDE, int(config.pos_embed_max_size))
        side_px = side // config.patch_size * config.patch_size * pipe.vae_scale_factor
        requests = [
            Request(
                prompt=prompt,
                steps=CALIBRATION_STEPS,
                cfg=CALIBRATION_CFG,
                seed=seed,
                width=side_px,
                height=side_px,
            )
            for seed, prompt in enumerate(CALIBRATION_PROMPTS)
        ]
        tokens = self._load.model.max_sequence_length
        pipe.transformer = GraphDenoiser(transformer, run)
        try:
            family = family_of(self._load.model.family, pipe)
            pipe.set_progress_bar_config(disable=True)
            arguments = family.arguments(requests, [None] * len(requests), tokens)
            arguments["output_type"] = "latent"
            arguments["generator"] = [generator(request.seed) for request in requests]
            with foreign_errors():
                pipe(**arguments)
        finally:
            pipe.transformer = transformer
        return feeds

"""The compiled local inference path for SD3 and SD3.5, readable in one sitting.

`generate.generate` is the whole way from a prompt to pixels: text (`text`), the denoising loop
(`samplers` over `schedule`, guidance and skipped evaluations by `guidance` and `cache`), the
autoencoder (`vae`). `model` is the MMDiT-X on weights fused by `weights`; who runs one of its steps
is an executor: our C++ in `sd35_kernels` on a CPU, torch.compile elsewhere, plain PyTorch as the
reference. The package imports nothing of the benchmark.
"""

"""The W8A8 linear layer: 8-bit weights with a scale per output channel, 8-bit activations.

The idea: ``y = x Wᵀ + b`` with x [M, K] and W [N, K] is computed as
``(q_x q_Wᵀ) · s_x · s_W + b``, where ``q`` are 8-bit integers (or fp8 e4m3 values) and ``s`` one
float32 scale per row of x and per row of W, so that the scales leave the sum over K. Weights are
quantised once, activations in every call. The integer sum is exact (int32), so the only errors are
the two roundings, about 0.7 % of the output's standard deviation each for normal values.

The cost, in operations and bytes:

- product: 2·M·N·K integer operations, the same count as in floating point. What 8 bits buy is
  their rate (4 times fp32's per VNNI instruction, twice bf16's on a tensor core) and N·K bytes of
  weights instead of 4·N·K;
- quantising x: reads M·K·e bytes twice (maximum, then rounding), writes M·K; 5·M·K operations;
- scaling: reads 4·M·N bytes of int32 and writes M·N·e, 3·M·N operations.

At M = 1024, K = 1536, N = 6144 in fp32: 19.3 G operations, against 14 MB for quantising and
50 MB for scaling. The overhead per operation of the product falls as 1/N and 1/K, so layers of a
few hundred channels gain little, and layers of a few rows (M = batch) are bound by weight bytes.
"""

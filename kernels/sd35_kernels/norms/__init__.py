"""The passes over memory between an MMDiT-X block's products: norms, modulation, gates, heads.

The idea: a block reads and writes its activations far more often than its products need. In eager
PyTorch a step of SD3.5-Medium at 1024 px and a batch of two moves 64 GB in such passes, fused
9.8 GB, and 54 % of the first is QK-RMSNorm taken apart. Three fused passes, each of which reads its
input once and writes what the next product or attention takes:

| operation | reads | writes |
| --- | --- | --- |
| `modulated_norm`: LayerNorm, scale, shift | x | the product's input, in 8 bits if asked |
| `gated_norm`: x + gate · update, then the same | x, update | the sum, the product's input |
| `joint_heads`: RMSNorm of q and k, two streams put together | qkv of both | q, k, v |

All are bound by bytes: a row of 1,536 bf16 values is 3 KB in and 3 KB out for some 20,000
operations, 3 a byte, where an H200 does 14 a byte in float32 outside its tensor cores.

`reference` has the arithmetic in plain PyTorch, `gpu` the Triton kernels. No backend calls them
yet: what inductor makes of the same arithmetic is fused as well, and an operation earns its place
by 5 % of a block on a GPU (kernels/bench/gpu_block.py).
"""

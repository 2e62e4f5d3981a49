"""Faster programs on the CPU: operations that XLA's CPU compiler runs slowly are replaced by equal ones.

- `rewrite`: evaluates a function's program with some of its equations replaced; the other platforms are left alone
- `pooling`: the replacement for max-pooling and its gradient, with the same bits
- `threefry`: the replacement for random bits, with the same bits
- `separate`: keeps an operation from being fused with what uses its result
- `sums`: kernel gradients as single matrix products, equal to rounding; opt-in
- `loops`: steps inside a loop, with the speed and the bits that they have outside
"""

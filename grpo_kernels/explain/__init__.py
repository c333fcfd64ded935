"""One step of GRPO, worked out by hand and printed: ``python -m grpo_kernels.explain``.

`by_hand` is plain Python with the `math` module, so that it can be followed with a pocket calculator.
`kernel` hands the same numbers to `fused_grpo_loss`; the program fails if they differ.
"""

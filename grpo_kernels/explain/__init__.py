"""One step of GRPO, worked out by hand and printed: ``python -m grpo_kernels.explain``.

With ``--support`` it is the probabilities over what a truncating sampler kept, with ``--distill`` the divergences of a
student from its teacher.

`by_hand`, `support_by_hand` and `distill_by_hand` are plain Python with the `math` module, so that they can be followed
with a pocket calculator. `kernel` hands the same numbers to the package's functions; the program fails if they differ.
`text`, `support_text` and `distill_text` say what is printed.
"""

"""Benchmarks of `grpo_kernels` against what a user would run instead: `python -m benchmarks --help`.

Read in this order: `cases` (what is measured, on which data), `baselines` (who is measured),
`oracle` (nobody's speed is reported before its result has been checked), `measure` (time and
memory), `suite` (the loop over all of it), `report` (table, JSON, CSV), `environment` (where).
`compile_report` stands apart: what the compiler makes of the kernels, without a GPU.
"""

"""Benchmarks of `grpo_kernels` against what a user would run instead: `python -m benchmarks --help`.

Read in this order: `cases` (what is measured, on which data), `baselines` and `baselines_peers` (who is
measured), `oracle` (nobody's speed is reported before its result has been checked), `measure` (time and
memory), `budget` (how long), `suite` (the loop over all of it), `warm` (kernels compiled beforehand), `report` (table,
JSON, CSV), `plots` (PNG), `environment` (where), `records` (what is kept in `results/`, and the README's table of it).
`test_small` is a small set for pytest-benchmark: `python -m pytest benchmarks --benchmark-only`.
`end_to_end` and `training_steps` are whole steps of TRL's trainers, stock and fused; `random_policy` is what they
train, also as a folder for the minimal trainer. `compile_report` and `traffic_report` stand apart: what is known of
the kernels without a GPU; `ppo_vs_grpo`: training with either; and `four_ways`: they, supervised training and
distillation from one start.
"""

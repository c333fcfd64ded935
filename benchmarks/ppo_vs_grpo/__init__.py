"""PPO beside GRPO on one task: `python -m benchmarks.ppo_vs_grpo --help`.

Read in this order: `ppo` (what PPO has and GRPO has not: returns, GAE, a value network), `arms` (one update of each),
`runs` (both from the same weights, over several seeds), `memory` (what a step holds at most), `report` (table, summary,
files), `plot` (PNG).
"""

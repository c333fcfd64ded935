"""A minimal GRPO trainer: ``python -m grpo_kernels.trainer``.

Read ``loop.py`` first: it is the algorithm, top to bottom. Around it, one file each: ``rollout`` (what a
step learns from), ``sampler`` (top-k and top-p), ``scoring`` (model to log-probabilities and loss),
``normalise`` (micro-batches), ``rewards``, ``options`` (every knob) and ``arguments`` (from the command
line), ``task`` and ``data`` (problems), ``tokenizer``, ``model``, ``head`` (of the model, for a loss
without logits), ``build`` (all of these from options), ``warmup`` (the short supervised phase before),
``checkpoint``, ``records`` (metrics.jsonl), ``console``, ``plots``, ``overlay`` and ``tensorboard``;
``cli`` is a whole run.

The trainer needs more than the package does: ``pip install transformers matplotlib rich``.
"""

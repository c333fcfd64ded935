"""A minimal GRPO trainer: ``python -m grpo_kernels.trainer``.

Read ``loop.py`` first: it is the algorithm, top to bottom. Around it, one file each: ``options``
(every knob), ``task`` (problems and their reward), ``tokenizer``, ``model``, ``head`` (of the model, for
a loss without logits), ``warmup`` (the short supervised phase before), ``records`` (metrics.jsonl),
``console`` and ``plots``.

The trainer needs more than the package does: ``pip install transformers matplotlib rich``.
"""

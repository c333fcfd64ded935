"""prime-rl: any of this package's losses, as its custom loss.

    [trainer.loss]
    type = "custom"
    import_path = "fused_loss.fused_policy_loss"
    kwargs = { loss_type = "cispo", cispo_max = 5.0 }

Name a copy of this file fused_loss.py, and put it on the PYTHONPATH. See docs/hosts.md.

Written against src/prime_rl/trainer/rl/loss.py and the page on algorithms, in the form with loss_weights and IPO as
the default (2026; no release number).
"""

from prime_rl.trainer.rl.loss import LossInputs, LossOutputs

from grpo_kernels import policy_loss


def fused_policy_loss(inputs: LossInputs, **config) -> LossOutputs:
    """The loss of one sequence, as a sum: prime-rl divides by the tokens of the batch.

    Args:
        inputs: ``trainer_logprobs`` (N,), ``inference_logprobs`` (N,), ``advantages`` (N,), ``loss_mask`` (N,), and
            ``ref_logprobs`` and ``loss_weights``, (N,) or None.
        config: fields of `grpo_kernels.LossConfig`, but ``loss_agg_mode``.
    """
    if config.get("beta", 0.0) and inputs.ref_logprobs is None:
        raise ValueError("beta needs ref_logprobs, which prime-rl sends for its reference-scoring algorithms alone.")
    if config.get("beta", 0.0) and inputs.loss_weights is not None:
        raise ValueError("beta with loss_weights: the weights would not reach the KL. Leave loss_aggregation at token.")
    rows = {  # (1, N): one sequence
        "old_logps": inputs.inference_logprobs, "ref_logps": inputs.ref_logprobs,
        "importance_weights": inputs.loss_weights, "completion_mask": inputs.loss_mask,
    }  # fmt: skip
    rows = {name: x if x is None else x[None] for name, x in rows.items()}
    out = policy_loss(inputs.trainer_logprobs[None], inputs.advantages[None], loss_agg_mode="token-sum", **rows,
                      **config)  # fmt: skip
    return LossOutputs(loss=out.loss, metrics={name: x for name, x in out.metrics.items() if name != "policy_loss"})

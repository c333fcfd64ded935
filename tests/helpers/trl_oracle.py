"""TRL's own loss as an oracle: the unpatched `GRPOTrainer._compute_loss` on a trainer that is only a stub.

`_compute_loss` asks its trainer for a handful of attributes and for log-probs of the model. The stub
has the attributes, set from the arguments as `GRPOTrainer.__init__` sets them, and makes the log-probs
from logits that the caller gives; so one gets TRL's loss and metrics of any logits, differentiable.
Importing this module needs TRL: `pytest.importorskip("trl")` first.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor
from trl import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer


def trl_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None,
    tool_mask: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    num_processes: int = 1,
    training: bool = True,
    **args: object,
) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss and metrics.

    Args:
        logits: (B, T, V), any float dtype; computed with as they are, float64 included.
        completion_ids: (B, T); what lies where the mask is 0 may be anything.
        advantages: (B,) or (B, T).
        completion_mask: (B, T); None: all ones.
        old_logps, ref_logps, sampling_per_token_logps: (B, T), as in a trainer's batch.
        importance_sampling_ratio: (B, T) or (B, 1), applied as TRL does when vLLM has sampled.
        tool_mask: (B, T), 0 where a tool has written.
        num_items_in_batch: the generation batch's token count over all processes; None: that of
            this call. TRL divides it by num_processes, and in training multiplies it by
            gradient_accumulation_steps / steps_per_generation.
        num_processes: only as a divisor; this process is alone.
        training: False for eval mode.
        **args: fields of GRPOConfig; the others have TRL's defaults (loss_type "dapo" and, if beta is
            not 0, the bias-corrected KL). `steps_per_generation` defaults to
            `gradient_accumulation_steps`, as in TRL.

    Returns: the 0-d loss, differentiable with respect to logits, and {name: value} of what was logged.

    Raises:
        TypeError: an argument that GRPOConfig does not have.
    """
    mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask.long()
    num_items = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    batch = {
        "prompt_ids": completion_ids.new_zeros(mask.shape[0], 1),
        "prompt_mask": mask.new_ones(mask.shape[0], 1),
        "completion_ids": completion_ids,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": num_items,
        "old_per_token_logps": old_logps,
        "ref_per_token_logps": ref_logps,
        "importance_sampling_ratio": importance_sampling_ratio,
        "sampling_per_token_logps": sampling_per_token_logps,
        "tool_mask": tool_mask,
    }
    batch = {name: value for name, value in batch.items() if value is not None}

    config = trl_args(**args)
    trainer = stub_trainer(config, num_processes, training, corrected=importance_sampling_ratio is not None)
    log_p = (logits / config.temperature).log_softmax(dim=-1)
    logps = log_p.gather(-1, completion_ids.masked_fill(mask == 0, 0).unsqueeze(-1)).squeeze(-1)
    entropies = -(log_p.exp() * log_p).sum(dim=-1)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropies, None)
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    logged = trainer._metrics["train" if training else "eval"]
    return loss, {name: values[-1] for name, values in logged.items()}


def trl_args(**overrides: object) -> SimpleNamespace:
    """GRPOConfig's fields with its defaults, without its checks of the machine it would train on."""
    fields = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    unknown = overrides.keys() - fields.keys()
    if unknown:
        raise TypeError(f"GRPOConfig has no {', '.join(sorted(unknown))}")
    args = SimpleNamespace(**{**fields, **overrides})
    if args.steps_per_generation is None:
        args.steps_per_generation = args.gradient_accumulation_steps
    return args


def stub_trainer(args: SimpleNamespace, num_processes: int, training: bool, corrected: bool) -> object:
    """What `_compute_loss` reads of a trainer; `corrected`: vLLM has sampled and its ratios are given."""
    accelerator = SimpleNamespace(
        num_processes=num_processes,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    trainer = SimpleNamespace(
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=training),
        current_gradient_accumulation_steps=args.gradient_accumulation_steps,
        loss_type=args.loss_type,
        importance_sampling_level=args.importance_sampling_level,
        beta=args.beta,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        max_completion_length=args.max_completion_length,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        top_entropy_quantile=args.top_entropy_quantile,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        aux_loss_enabled=False,
        entropy_coef=args.entropy_coef,
        use_adaptive_entropy=args.use_adaptive_entropy,
        _entropy_bonus_enabled=args.entropy_coef != 0.0 or args.use_adaptive_entropy,
        _entropy_window_stats=None,
        _last_world_entropy=float("inf"),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    return trainer

"""GRPO, top to bottom: sample, reward, compare within the group, step (DeepSeekMath, arXiv:2402.03300).

Left out, and why:
  * Learned rewards and a value network: the reward is checked, and the group's mean is the baseline.
  * Minibatches and gradient accumulation: one batch fits. It is used ``num_iterations`` times, so
    that ratios leave 1 and clipping acts all the same.
  * A separate sampler and the correction for its rounding: ``generate`` samples from the very weights
    that are trained.
  * Sampling tricks (top-p, filtering of groups without spread, masking of truncated completions):
    each changes what is optimised, and nothing here needs them.
  * Several devices, and resuming: a run takes a minute or two.
"""

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels import (
    LossConfig,
    LossOutput,
    fused_grpo_loss,
    fused_linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
)
from grpo_kernels.integrations.head import Head, body
from grpo_kernels.metrics import combine
from grpo_kernels.trainer.head import find_head
from grpo_kernels.trainer.options import Options
from grpo_kernels.trainer.task import Problem, Task

Row = dict[str, float]  # one line of metrics.jsonl


@dataclass(frozen=True)
class Rollout:
    """B completions and what they earned; rows [k·G, (k+1)·G) share a prompt."""

    prompt_ids: torch.Tensor  # (B, P), padded on the left
    prompt_mask: torch.Tensor  # (B, P), 0 at padding
    completion_ids: torch.Tensor  # (B, T), padded on the right
    completion_mask: torch.Tensor  # (B, T) bool, up to the end of sequence, which counts
    ended: torch.Tensor  # (B,) bool, False: cut off at the maximum length
    rewards: torch.Tensor  # (B,) fp32


def precision(options: Options, device: torch.device) -> AbstractContextManager:
    """Autocast to bf16 if asked for; the weights stay fp32, or small updates would round to nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16")


def mask_after_eos(completion_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """(B, T) bool: True up to the first end of sequence, which the policy chose too, False behind it."""
    is_eos = (completion_ids == eos_token_id).int()
    return is_eos.cumsum(1) - is_eos == 0


def model_inputs(rollout: Rollout) -> dict[str, torch.Tensor]:
    """Prompts and completions, one behind the other."""
    # Nothing attends forward, so that what follows the end of sequence needs no attention mask.
    attention = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.completion_ids)], dim=1)
    return {
        "input_ids": torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }


def completion_logits(policy: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Logits (B, T+1, V) of the positions that chose ``completion_ids``, and of one more behind them.

    ``logits[:, t]`` scores ``completion_ids[:, t]``: each is the output at the position before.
    """
    return policy(**model_inputs(rollout), logits_to_keep=rollout.completion_ids.shape[1] + 1).logits


def completion_hidden(policy: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Hidden states (B, T+1, H), of which the head makes `completion_logits`."""
    hidden = body(policy)(**model_inputs(rollout), use_cache=False).last_hidden_state
    hidden = hidden[:, -rollout.completion_ids.shape[1] - 1 :]
    # As autocast would hand them to the head.
    return hidden.bfloat16() if torch.is_autocast_enabled(hidden.device.type) else hidden


def completion_logps(
    policy: PreTrainedModel, head: Head | None, rollout: Rollout, options: Options, **kwargs
) -> torch.Tensor:
    """Log-probabilities (B, T). With ``head`` a chunk of rows at a time, and no logits as a whole."""
    with precision(options, policy.device):
        states = completion_hidden(policy, rollout) if head else completion_logits(policy, rollout)
    if head is None:
        return token_logprobs(states, rollout.completion_ids, **kwargs).logps
    states = head.arguments(policy, states)
    return linear_token_logprobs(**states, completion_ids=rollout.completion_ids, **kwargs).logps


def completion_loss(
    policy: PreTrainedModel, head: Head | None, rollout: Rollout, options: Options, **kwargs
) -> LossOutput:
    """The loss; ``head`` as in `completion_logps`."""
    with precision(options, policy.device):
        states = completion_hidden(policy, rollout) if head else completion_logits(policy, rollout)
    if head is None:
        return fused_grpo_loss(states, rollout.completion_ids, **kwargs)
    states = head.arguments(policy, states)
    return fused_linear_grpo_loss(**states, completion_ids=rollout.completion_ids, **kwargs)


@torch.no_grad()
def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    num_generations: int = 1,
    temperature: float | None = None,
) -> Rollout:
    """Completes each problem ``num_generations`` times and rewards the completions.

    Args:
        temperature: None: greedy.
    """
    prompts = [problem.prompt for problem in problems for _ in range(num_generations)]
    answers = [problem.answer for problem in problems for _ in range(num_generations)]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True).to(policy.device)
    how = {"do_sample": False} if temperature is None else {
        "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    sequences = policy.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=task.max_completion_length,
        **how,
    )
    completion_ids = sequences[:, encoded["input_ids"].shape[1] :]
    mask = mask_after_eos(completion_ids, tokenizer.eos_token_id)
    ended = (completion_ids == tokenizer.eos_token_id).any(1)
    # Special tokens inside a completion stay in its text: they make it wrong, as they should.
    lengths = (mask.sum(1) - ended.int()).tolist()
    completions = tokenizer.batch_decode([ids[:n] for ids, n in zip(completion_ids.tolist(), lengths)])
    return Rollout(
        prompt_ids=encoded["input_ids"],
        prompt_mask=encoded["attention_mask"],
        completion_ids=completion_ids,
        completion_mask=mask,
        ended=ended,
        rewards=torch.tensor(task.reward(prompts, completions, answers), device=policy.device),
    )


def evaluate(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> float:
    """The share of held-out problems that the policy solves, greedily."""
    policy.eval()
    return sample(policy, tokenizer, task, task.held_out).rewards.double().mean().item()


def batches(problems: Sequence[Problem], size: int, seed: int) -> Iterator[list[Problem]]:
    """Endless batches; every problem comes once before any comes again."""
    rng = random.Random(seed)
    waiting: list[Problem] = []
    while True:
        while len(waiting) < size:
            waiting += rng.sample(problems, len(problems))
        yield waiting[:size]
        waiting = waiting[size:]


def step_on(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    rollout: Rollout,
    optimizer: torch.optim.Optimizer,
    config: LossConfig,
    options: Options,
    head: Head | None = None,
) -> Row:
    """``num_iterations`` optimizer steps on one rollout; the metrics are over all of them.

    Args:
        head: of the policy, for a loss without logits; None: with logits.
    """
    mask, temperature = rollout.completion_mask, options.temperature
    ref_logps = None
    if reference is not None:
        with torch.no_grad():
            ref_logps = completion_logps(reference, head, rollout, options, mask=mask, temperature=temperature)

    old_logps = None  # on-policy in the first iteration: ratio 1, and the loss is about 0; its gradient is not
    losses, norms, sums = [], [], []
    for _ in range(options.num_iterations):
        out = completion_loss(
            policy,
            head,
            rollout,
            options,
            rewards=rollout.rewards,
            num_generations=options.num_generations,
            old_logps=old_logps,
            ref_logps=ref_logps,
            completion_mask=mask,
            temperature=temperature,
            return_entropy=True,
            config=config,
        )
        if old_logps is None:
            old_logps, reward_metrics = out.logps, out.metrics
        optimizer.zero_grad()
        out.loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), options.max_grad_norm))
        optimizer.step()
        losses.append(out.loss.detach())
        sums.append(out.sums)

    metrics = combine(sums)
    del metrics["policy_loss"]  # a sum over the iterations
    # Rewards are those of the rollout, however often it is used.
    metrics |= {name: reward_metrics[name] for name in ("reward", "reward_std", "frac_reward_zero_std")}
    return {
        "loss": torch.stack(losses).mean().item(),
        "grad_norm": torch.stack(norms).mean().item(),
        **{name: value.item() for name, value in metrics.items()},
    }


def length_metrics(rollout: Rollout) -> Row:
    lengths = rollout.completion_mask.sum(1).float()
    terminated = lengths[rollout.ended]
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/mean_terminated_length": terminated.mean().item() if terminated.numel() else 0.0,
        "completions/clipped_ratio": 1.0 - rollout.ended.float().mean().item(),
    }


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    options: Options,
    log: Callable[[Row], None],
) -> None:
    """Improves the policy in place. The reward of its own completions of training problems is all it learns from.

    Args:
        log: receives a row of metrics per step, under TRL's names; and rows with ``eval/accuracy`` before
            the first step, after the last, and every ``options.eval_every`` steps. The last is
            ``options.steps``, or without it the one whose rewards count as solved.

    Raises:
        OptionError: the loss is to do without logits, and the head of the policy is not understood.
    """
    config = options.loss_config(task.max_completion_length)
    linear = options.takes_hidden_states(task.max_completion_length, len(tokenizer))
    head = find_head(policy) if linear else None
    reference = copy.deepcopy(policy).eval().requires_grad_(False) if config.beta else None
    optimizer = torch.optim.AdamW(policy.parameters(), options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    rise = max(1, options.max_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / rise) * (1.0 - step / options.max_steps)
    )
    num_tokens, rewards = 0, []
    log({"step": 0, "eval/accuracy": evaluate(policy, tokenizer, task)})
    for step, problems in zip(range(1, options.max_steps + 1), batches(task.train, options.batch_size, options.seed)):
        start = time.perf_counter()
        policy.eval()
        with precision(options, policy.device):
            rollout = sample(policy, tokenizer, task, problems, options.num_generations, options.temperature)
        sampled = time.perf_counter()
        policy.train()
        learning_rate = schedule.get_last_lr()[0]
        row = {"step": step, **step_on(policy, reference, rollout, optimizer, config, options, head)}
        schedule.step()
        num_tokens += int(rollout.prompt_mask.sum() + rollout.completion_mask.sum())
        log({
            **row,
            **length_metrics(rollout),
            "learning_rate": learning_rate,
            "num_tokens": num_tokens,
            "epoch": step * options.batch_size / len(task.train),
            "sampling_time": sampled - start,
            "step_time": time.perf_counter() - start,
        })  # fmt: skip
        rewards.append(row["reward"])
        last = step == options.max_steps or options.solved(rewards)
        if last or step % options.eval_every == 0:
            log({"step": step, "eval/accuracy": evaluate(policy, tokenizer, task)})
        if last:
            return

"""GRPO, top to bottom: sample, reward, compare within the group, step (DeepSeekMath, arXiv:2402.03300).

    for each step:
        draw prompts, sample a group of completions of each                   `sample`
        reward them; advantage = how much better than the group               `score`, `advantages_of`
        for each epoch, for each minibatch: loss, gradient, optimizer step    `step_on`

With a teacher the loss is the divergence from it, on the same samples, and rewards are only looked at.
Around it: ``scoring`` (model → log-probabilities and loss), ``normalise`` (micro-batches), ``rewards``, ``rollout``.

Left out, and why:
  * Learned rewards and a value network: the reward is checked, and the group's mean is the baseline.
  * A separate sampler and the correction for its rounding: ``generate`` samples from the very weights
    that are trained. Where it truncates, the loss is over the sets that it kept.
  * Filtering of groups without spread: it changes which problems are learned from, and costs samples.
  * Several devices: one GPU holds the models that this loop is for.
"""

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from grpo_kernels import LossConfig
from grpo_kernels.integrations.head import ModelHead
from grpo_kernels.objective.metrics import combine
from grpo_kernels.trainer.gauges import MemoryPeak, Stopwatch
from grpo_kernels.trainer.head import find_head
from grpo_kernels.trainer.normalise import Whole, share
from grpo_kernels.trainer.options import REWARD_WINDOW, Options
from grpo_kernels.trainer.pass_at_k import pass_rates
from grpo_kernels.trainer.progress import Progress, Saver
from grpo_kernels.trainer.randomness import set_aside
from grpo_kernels.trainer.rewards import advantages_of, score
from grpo_kernels.trainer.rollout import (
    Rollout,
    Row,
    length_metrics,
    mask_after_eos,
    model_inputs,
    reward_metrics,
    sampling_metrics,
)
from grpo_kernels.trainer.sampler import Truncation
from grpo_kernels.trainer.scoring import completion_logits, completion_logps, completion_loss, precision
from grpo_kernels.trainer.task import Problem, Task, columns_of
from grpo_kernels.trainer.teacher import Teacher, divergence

# What belongs to the loop, and is kept in files of its own.
__all__ = ["Progress", "Rollout", "Row", "completion_logits", "mask_after_eos", "model_inputs"]

EVALUATED_AT_ONCE = 512  # completions of held-out problems


@torch.no_grad()
def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    num_generations: int = 1,
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Rollout:
    """Completes each problem ``num_generations`` times and rewards the completions.

    Args:
        temperature: None: greedy.
        top_p: the likeliest tokens of this probability are sampled from.
        top_k: the likeliest tokens, so many of them, are sampled from; 0: all.

    Raises:
        RewardError: a reward function fails.
    """
    repeated = [problem for problem in problems for _ in range(num_generations)]
    prompts = [problem.prompt for problem in repeated]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not task.templated)
    encoded = encoded.to(policy.device)
    how, truncation = {"do_sample": False}, None
    if temperature is not None:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if top_k or top_p < 1:
            truncation = Truncation(encoded["input_ids"].shape[1], tokenizer.eos_token_id, temperature, top_k, top_p)
            how |= {"temperature": 1.0, "logits_processor": LogitsProcessorList([truncation])}
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
    support, sampling_logps = truncation.kept(completion_ids, mask) if truncation else (None, None)
    start = time.perf_counter()
    rewards, parts = score(task.weighted_rewards, prompts, completions, columns_of(repeated))
    return Rollout(
        prompt_ids=encoded["input_ids"],
        prompt_mask=encoded["attention_mask"],
        completion_ids=completion_ids,
        completion_mask=mask,
        ended=ended,
        rewards=rewards.to(policy.device),
        support=support,
        sampling_logps=sampling_logps,
        reward_parts=parts,
        prompts=tuple(prompts),
        completions=tuple(completions),
        reward_time=time.perf_counter() - start,
    )


def evaluate(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> float:
    """The share of held-out problems that the policy solves, greedily: the mean of ``task.reward``."""
    policy.eval()
    task, rewards = replace(task, rewards=()), []
    for i in range(0, len(task.held_out), EVALUATED_AT_ONCE):
        rewards.append(sample(policy, tokenizer, task, task.held_out[i : i + EVALUATED_AT_ONCE]).rewards)
    return torch.cat(rewards).double().nanmean().item()


def evaluate_samples(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, options: Options
) -> Row:
    """pass@k of ``options.eval_samples`` completions of each held-out problem, sampled as in training.

    Each call starts from the run's seed, so that calls differ by the policy alone, and leaves the random generators
    as they were, so that training does not notice.
    """
    policy.eval()
    task, n, rewards = replace(task, rewards=()), options.eval_samples, []
    at_once = max(1, EVALUATED_AT_ONCE // n)
    with set_aside(options.seed), precision(options, policy.device):
        for i in range(0, len(task.held_out), at_once):
            rollout = sample(policy, tokenizer, task, task.held_out[i : i + at_once], n, options.temperature,
                             options.top_p, options.top_k)  # fmt: skip
            rewards.append(rollout.rewards.view(-1, n))
    return pass_rates(torch.cat(rewards))


def measure(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, options: Options) -> Row:
    """What is known of the held-out problems: the greedy accuracy, and pass@k where it is asked for."""
    row = {"eval/accuracy": evaluate(policy, tokenizer, task)}
    return row | evaluate_samples(policy, tokenizer, task, options) if options.eval_samples else row


def batches(problems: Sequence[Problem], size: int, seed: int) -> Iterator[list[Problem]]:
    """Endless batches; every problem comes once before any comes again."""
    rng = random.Random(seed)
    waiting: list[Problem] = []
    while True:
        while len(waiting) < size:
            waiting += rng.sample(problems, len(problems))
        yield waiting[:size]
        waiting = waiting[size:]


def minibatches(rows: int, parts: int) -> Sequence[torch.Tensor]:
    """Numbers 0 to rows − 1, shuffled into equal parts; one part is in order."""
    return (torch.randperm(rows) if parts > 1 else torch.arange(rows)).chunk(parts)


def step_on(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    rollout: Rollout,
    optimizer: torch.optim.Optimizer,
    config: LossConfig,
    options: Options,
    head: ModelHead | None = None,
    teacher: Teacher | None = None,
) -> Row:
    """``num_iterations`` epochs of ``num_minibatches`` optimizer steps each; the metrics are over all of them.

    Args:
        head: of the policy, for a loss without logits; None: with logits.
        teacher: takes the place of rewards, advantages and ``config``: the loss is the divergence from it.
    """
    if not options.replay:
        rollout = replace(rollout, support=None)
    # Compared with its group, before the group is split; a reward of NaN gets advantage 0.
    advantages = advantages_of(rollout, options)
    mask, temperature, rows = rollout.completion_mask, options.temperature, len(advantages)
    if options.mask_truncated_completions:
        mask = mask & rollout.ended[:, None]

    @torch.no_grad()
    def logps_under(model: PreTrainedModel) -> torch.Tensor:  # (B, T)
        return torch.cat([
            completion_logps(model, head, rollout.rows(part), options, mask=mask[part], temperature=temperature)
            for part in torch.arange(rows).split(options.rows_at_once)
        ])  # fmt: skip

    # Ratios are to the policy that sampled, which the first update changes. With one update they are all 1,
    # and the loss is about 0; its gradient is not.
    old_logps = logps_under(policy) if options.updates > 1 and teacher is None else None
    ref_logps = None
    if config.beta and teacher is None:
        ref_logps = old_logps if options.kl_to == "old" else logps_under(reference)

    losses, norms, sums, drift = [], [], [], []
    updating = Stopwatch(policy.device)
    for _ in range(options.num_iterations):
        for minibatch in minibatches(rows, options.num_minibatches):
            whole = Whole.of(mask[minibatch])
            optimizer.zero_grad()
            for part in minibatch.chunk(options.gradient_accumulation_steps):
                if teacher is not None:  # the mean over the tokens of the minibatch
                    out = divergence(policy, head, teacher, rollout.rows(part), options, completion_mask=mask[part],
                                     num_items_in_batch=whole.tokens)  # fmt: skip
                else:
                    out = completion_loss(
                        policy,
                        head,
                        rollout.rows(part),
                        options,
                        advantages=advantages[part],
                        old_logps=None if old_logps is None else old_logps[part],
                        ref_logps=None if ref_logps is None else ref_logps[part],
                        completion_mask=mask[part],
                        temperature=temperature,
                        return_entropy=True,
                        config=config,
                        **share(config, Whole.of(mask[part]), whole),
                    )
                    if not norms and rollout.sampling_logps is not None:
                        drift.append((out.logps - rollout.sampling_logps[part])[mask[part]])
                out.loss.backward()
                losses.append(out.loss.detach())
                sums.append(out.sums)
            with updating:
                norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), options.max_grad_norm))
                optimizer.step()

    metrics = combine(sums)
    if "policy_loss" in metrics:  # a sum over the optimizer steps; a divergence has none
        metrics["policy_loss"] = metrics["policy_loss"] / options.updates
    return {
        "loss": torch.stack(losses).sum().item() / options.updates,
        "grad_norm": torch.stack(norms).mean().item(),
        **reward_metrics(rollout, advantages, options.num_generations),
        **{name: value.item() for name, value in metrics.items()},
        **sampling_metrics(drift),
        "optimizer_time": updating.seconds(),
    }


def rate_at(options: Options) -> Callable[[int], float]:
    """The learning rate of steps 1, 2, ...: a schedule of transformers, which starts above 0."""
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rise = max(1, round(options.lr_warmup_ratio * options.max_steps))
    schedule = get_scheduler(options.lr_scheduler_type, unused, rise, options.max_steps + 1)
    return lambda step: options.learning_rate * schedule.lr_lambdas[0](step)


def frozen(policy: PreTrainedModel) -> PreTrainedModel:
    """A copy that is not trained."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    options: Options,
    log: Callable[[Row], None],
    *,
    reference: PreTrainedModel | None = None,
    teacher: Teacher | None = None,
    saver: Saver | None = None,
    watch: Callable[[int, Rollout], None] = lambda step, rollout: None,
) -> None:
    """Improves the policy in place, by the reward of its own completions of training problems, or by a teacher.

    Args:
        log: receives a row of metrics per step, under TRL's names; and, unless ``options.eval_every`` is 0,
            rows of `measure` before the first step, after the last, and every so many steps. The last is
            ``options.steps``, or without it the one whose rewards count as solved.
        reference: what the KL is to; None: the policy as it comes.
        teacher: what the policy is pulled towards on its own completions, in the place of rewards.
        saver: keeps the state after steps, and knows where a continued run stands.
        watch: receives every step's completions.

    Raises:
        OptionError: the loss is to do without logits, and the head of the policy is not understood.
        RewardError: a reward function fails.
    """
    config = options.loss_config(task.max_completion_length)
    linear = options.takes_hidden_states(task.max_completion_length, len(tokenizer))
    head = find_head(policy) if linear else None
    if config.beta and options.kl_to == "reference" and reference is None and teacher is None:
        reference = frozen(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    rate, drawn = rate_at(options), batches(task.train, options.batch_size, options.seed)
    progress = saver.restore(optimizer) if saver else Progress()
    if progress.step == 0 and options.eval_every:
        log({"step": 0, **measure(policy, tokenizer, task, options)})
    for _ in range(progress.step):
        next(drawn)
    for step in range(progress.step + 1, options.max_steps + 1):
        start, peak = time.perf_counter(), MemoryPeak(policy.device)
        policy.eval()
        with precision(options, policy.device):
            rollout = sample(policy, tokenizer, task, next(drawn), options.num_generations, options.temperature,
                             options.top_p, options.top_k)  # fmt: skip
        sampled, memory = time.perf_counter(), peak.row("sampling_memory")
        watch(step, rollout)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        policy.train()
        peak = MemoryPeak(policy.device)
        row = {"step": step, **step_on(policy, reference, rollout, optimizer, config, options, head, teacher)}
        progress.step, progress.num_tokens = step, progress.num_tokens + int(
            rollout.prompt_mask.sum() + rollout.completion_mask.sum()
        )
        progress.rewards = [*progress.rewards, row["reward"]][-REWARD_WINDOW:]
        end = time.perf_counter()
        log({
            **row,
            **length_metrics(rollout),
            "learning_rate": rate(step),
            "num_tokens": progress.num_tokens,
            "epoch": step * options.batch_size / len(task.train),
            "sampling_time": sampled - start - rollout.reward_time,
            "reward_time": rollout.reward_time,
            "loss_time": end - sampled,
            "step_time": end - start,
            **memory,
            **peak.row("loss_memory"),
        })  # fmt: skip
        last = step == options.max_steps or options.solved(progress.rewards)
        if options.eval_every and (last or step % options.eval_every == 0):
            log({"step": step, **measure(policy, tokenizer, task, options)})
        if saver:
            saver.save(optimizer, progress, last)
        if last:
            return

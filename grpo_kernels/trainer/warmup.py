"""The supervised warm-up: a policy that is sometimes right, since GRPO can only reinforce what it samples."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.trainer.loop import batches, evaluate
from grpo_kernels.trainer.options import Options
from grpo_kernels.trainer.task import Problem, Task

BATCH_SIZE = 256
LEARNING_RATE = 2e-3
CHECK_EVERY = 5
# How far above the aim the accuracy may end; there must be room left for GRPO to show.
MARGIN = 0.05


class WarmUp(NamedTuple):
    steps: int
    accuracy: float  # on the held-out problems; NaN without a step
    reached: bool  # the aim, or ran out of steps


def answer_loss(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], templated: bool = False
) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, end of sequence included.

    Args:
        templated: the prompts have their special tokens.
    """
    prompts = tokenizer([each.prompt for each in problems], add_special_tokens=not templated)["input_ids"]
    answers = tokenizer([each.answer for each in problems], add_special_tokens=False)["input_ids"]
    length = max(len(prompt) + len(answer) + 1 for prompt, answer in zip(prompts, answers))
    ids = torch.full((len(problems), length), tokenizer.pad_token_id)  # (B, L), padded on the right
    targets = torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        answer = torch.tensor([*answer, tokenizer.eos_token_id])
        ids[i, : len(prompt)] = torch.tensor(prompt)
        ids[i, len(prompt) : len(prompt) + len(answer)] = answer
        targets[i, len(prompt) : len(prompt) + len(answer)] = answer
    ids, targets = ids.to(policy.device), targets.to(policy.device)
    logits = policy(input_ids=ids, use_cache=False).logits  # padding is behind everything that counts
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())


def warm_up(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    options: Options,
    show: Callable[[int, float], None],
) -> WarmUp:
    """Trains the policy in place until it solves ``options.warmup_accuracy`` of the held-out problems.

    Skill comes fast once it comes. If a check finds the accuracy more than `MARGIN` above the aim, the
    policy goes back to where it was at the check before, and goes on at half the rate.

    Args:
        show: called with the step and the accuracy after each check.
    """
    if options.warmup_steps == 0:
        return WarmUp(0, float("nan"), False)
    aim, rate, check_every = options.warmup_accuracy, LEARNING_RATE, CHECK_EVERY
    optimizer = torch.optim.AdamW(policy.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0)
    problems = batches(task.train, BATCH_SIZE, seed=options.seed)
    accuracy = evaluate(policy, tokenizer, task)
    snapshot = copy.deepcopy((policy.state_dict(), optimizer.state_dict()))
    for step in range(1, options.warmup_steps + 1):
        policy.train()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 20)
        optimizer.zero_grad()
        answer_loss(policy, tokenizer, next(problems), task.templated).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step % check_every and step < options.warmup_steps:
            continue
        checked = evaluate(policy, tokenizer, task)
        show(step, checked)
        if checked > aim + MARGIN:
            policy.load_state_dict(snapshot[0])
            optimizer.load_state_dict(snapshot[1])
            rate, check_every = rate / 2, 1
            continue
        accuracy = checked
        if accuracy >= aim:
            return WarmUp(step, accuracy, True)
        snapshot = copy.deepcopy((policy.state_dict(), optimizer.state_dict()))
    return WarmUp(options.warmup_steps, accuracy, False)

"""Every knob of the trainer, with its default and meaning; `arguments.parse` reads them from a command line."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_kernels import LossConfig
from grpo_kernels.trainer.loss_options import LOSS_FIELDS, LossOptions, flag, in_flags, option
from grpo_kernels.trainer.normalise import Whole, share


class OptionError(ValueError):
    """An option's value is unusable; the message names the flag, what came, and the remedy."""


# Without --steps a run goes on until sampled completions earn this on average, over so many steps.
SOLVED_REWARD = 0.8
REWARD_WINDOW = 10
MOST_STEPS = 300
TASKS = ("addition", "countdown")
# Of transformers' schedules those that a length and a warm-up define.
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
             "inverse_sqrt")  # fmt: skip


@dataclass(frozen=True)
class Options(LossOptions):
    """Options of one run, checked on construction: those below, and the fields of `LossConfig`.

    Where None means a default, the default is filled in; in fields of `LossConfig` it is left to that.

    Raises:
        OptionError: a value outside its range; the message is one line that names the flag.
    """

    seed: int = option(0, "seeds everything: weights, problems, samples; same seed, same metrics on a CPU")
    output_dir: str = option(
        "output", "where metrics, curves and model go; a finished run's files are replaced", resumable=True
    )
    overwrite: bool = option(False, "replace the files of a run that is not finished, too (default: off)",
                              resumable=True)  # fmt: skip
    resume: bool = option(
        False, "continue the run in --output-dir from its last checkpoint, with its options (default: off)",
        resumable=True,
    )  # fmt: skip
    device: str = option("auto", "torch device, e.g. cpu or cuda:1; auto: cuda if there is one, else cpu",
                          resumable=True)  # fmt: skip
    dtype: str = option("float32", "bfloat16: autocast, the weights stay float32", ("float32", "bfloat16"))
    threads: int = option(1, "CPU threads of torch; so small a model gains little from more", resumable=True)

    model: str | None = option(
        None, "local folder or hub name of a causal LM (default: a tiny one with random weights, and a warm-up)"
    )
    hidden_size: int | None = option(
        None, "width of the tiny model, a multiple of 16; twice as wide is four times as large (default: 64)"
    )
    pad_token: str | None = option(None, "token that pads, for a tokenizer without one (default: the tokenizer's)")
    task: str = option("addition", "built-in task; --dataset takes its place", TASKS)
    dataset: str | None = option(
        None, "JSONL file, or hub name as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (default: the built-in task)"
    )
    eval_dataset: str | None = option(None, "held-out problems, likewise (default: a part of --dataset)")
    prompt_field: str = option("prompt", "field of --dataset with the prompt: a text, or a list of messages")
    answer_field: str = option("answer", "field of --dataset with the answer; rewards get all fields")
    held_out: int | None = option(None, "problems of --dataset to hold out (default: a tenth, 200 at most)")
    chat_template: str = option(
        "auto",
        "whom the tokenizer's template is applied to; auto: every prompt, if there is one; messages: prompts that "
        "are lists of messages alone; off: none",
        ("auto", "messages", "off"),
    )
    system_prompt: str | None = option(None, "system message in front of templated prompts (default: none)")
    max_prompt_length: int | None = option(None, "longer prompts, in tokens, are left out (default: no limit)")
    max_completion_length: int | None = option(
        None, "most tokens of a completion, the end included (default: the task's own; 256 with --dataset)"
    )

    reward: tuple[str, ...] = option(
        (),
        "exact_answer, format, target_length=WORDS, keyword_coherence, or your own MODULE:FUNCTION; again for "
        "another (default: exact_answer; a built-in task has its own)",
    )
    reward_weights: tuple[float, ...] = option((), "factor of each --reward in their sum (default: 1 each)")

    steps: int | None = option(
        None,
        f"GRPO steps (default: until {REWARD_WINDOW} steps have a mean reward of {SOLVED_REWARD}, {MOST_STEPS} max)",
        resumable=True,
    )
    batch_size: int = option(64, "prompts per step; each gets a group of completions")
    num_generations: int = option(8, "G, completions per prompt: the group whose mean reward is the baseline")
    num_iterations: int = option(2, "epochs on the completions of a step; from the second update on, clipping acts")
    num_minibatches: int = option(1, "parts that an epoch is shuffled into, with one optimizer step each")
    gradient_accumulation_steps: int = option(
        1, "parts that a minibatch is computed in, to save memory; the gradient is the whole minibatch's"
    )
    temperature: float = option(1.0, "sampling temperature, which the loss uses as well")
    top_p: float = option(1.0, "sample from the likeliest tokens that make up this probability")
    top_k: int = option(0, "sample from the likeliest tokens, so many of them; 0: off")
    replay: bool = option(
        True, "where --top-p or --top-k truncates, the loss is over the set that each token was drawn from "
        "(default: on)",
    )  # fmt: skip
    mask_truncated_completions: bool = option(
        False, "completions that reach the maximum length take no part in the loss (default: off)"
    )
    learning_rate: float | None = option(None, "AdamW's peak rate (default: 2e-3, with --model 1e-6)")
    lr_scheduler_type: str = option("linear", "what the rate does after its warm-up, as in transformers", SCHEDULES)
    lr_warmup_ratio: float = option(0.1, "share of the steps over which the rate rises; constant has no rise")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass, to save memory (default: off)"
    )

    teacher: str | None = option(
        None,
        "local folder or hub name of a causal LM with the policy's tokens: the policy is pulled towards it on its own "
        "samples, by no reward (default: none, which is GRPO)",
    )
    teacher_beta: float = option(
        1.0, "divergence from --teacher; 1: reverse KL, 0: forward KL, between: of both from their mixture"
    )

    kl_to: str = option(
        "reference", "KL to the policy that GRPO starts from, or to the one that sampled", ("reference", "old")
    )
    backend: str = option(
        "auto",
        "what computes the loss; auto: triton on a GPU, torch on a CPU; reference: the float math of reference/, "
        "from a checkout",
        ("auto", "torch", "triton", "reference"),
    )
    loss_path: str = option(
        "auto",
        "what the loss takes; linear: hidden states and head, so that logits are never held whole; "
        "auto: linear where they would not fit their budget",
        ("auto", "logits", "linear"),
    )
    logits_dtype: str = option(
        "hidden",
        "of --loss-path linear; hidden: the dtype of the hidden states; float32: bfloat16 is multiplied without "
        "rounding the logits",
        ("hidden", "float32"),
    )
    logits_budget_gib: float = option(4.0, "GiB that the logits of a loss and their gradient may take, for auto")

    eval_every: int = option(10, "steps between measurements of the held-out accuracy; 0: none", resumable=True)
    eval_samples: int = option(
        0, "completions of each held-out problem that each measurement samples, for pass@k with k = 1, 2, 4, ... up to "
        "that; 0: none", resumable=True,
    )  # fmt: skip
    samples_every: int = option(50, "steps between tables of samples; 0: none", resumable=True)
    save_every: int = option(50, "steps between checkpoints; one more is written at the end; 0: none, not even then",
                             resumable=True)  # fmt: skip
    save_total_limit: int = option(2, "checkpoints that are kept, the newest", resumable=True)

    warmup_steps: int | None = option(
        None, "supervised steps before GRPO, at most; 0: start without (default: 600, with --model 0)"
    )
    warmup_accuracy: float = option(0.38, "the warm-up ends when the held-out accuracy reaches this")

    def __post_init__(self) -> None:
        for name, alone, with_model in (("learning_rate", 2e-3, 1e-6), ("warmup_steps", 600, 0)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, alone if self.model is None else with_model)
        self._check_ranges()
        self._check_loss()
        self._check_sizes()
        weights, count = self.reward_weights, len(self.reward)
        _check(len(weights) in (0, count), "reward_weights", " ".join(map(str, weights)),
               f"one number per --reward, of which there are {count}")  # fmt: skip

    def _check_ranges(self) -> None:
        size = self.hidden_size
        _check(size is None or (size > 0 and size % 16 == 0), "hidden_size", size, "a multiple of 16 above 0")
        _check(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        for name in ("steps", "batch_size", "num_iterations", "num_minibatches", "gradient_accumulation_steps",
                     "save_total_limit", "threads", "held_out", "max_prompt_length",
                     "max_completion_length"):  # fmt: skip
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "at least 1")
        _check(self.num_generations >= 2, "num_generations", self.num_generations,
               "at least 2: an advantage compares completions of one prompt")  # fmt: skip
        for name in ("temperature", "learning_rate", "max_grad_norm", "logits_budget_gib"):
            value = getattr(self, name)
            _check(0 < value < math.inf, name, value, "a finite number above 0")
        for name in ("warmup_steps", "samples_every", "save_every", "eval_every", "eval_samples", "top_k"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _check(0 < self.warmup_accuracy < 1, "warmup_accuracy", self.warmup_accuracy, "between 0 and 1")
        _check(0 <= self.teacher_beta <= 1, "teacher_beta", self.teacher_beta, "from 0 to 1")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(0 <= self.lr_warmup_ratio <= 1, "lr_warmup_ratio", self.lr_warmup_ratio, "from 0 to 1")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            names = ", ".join(choice or "none" for choice in choices or ())
            _check(not choices or value in choices, field.name, value, f"one of {names}")
        for value in self.reward_weights:
            _check(math.isfinite(value), "reward_weights", value, "finite")

    def _check_loss(self) -> None:
        try:
            config = self.loss_config(max_completion_length=1)
            share(config, Whole(1, 1), Whole(1, 1))
        except (ValueError, TypeError) as error:
            raise OptionError(in_flags(str(error))) from None
        if config.top_entropy_quantile < 1 and self.gradient_accumulation_steps > 1:
            raise OptionError(
                "--top-entropy-quantile ranks the tokens of a whole minibatch. Set --gradient-accumulation-steps 1, or "
                "--num-minibatches higher."
            )

    def _check_sizes(self) -> None:
        """What only has a meaning together."""
        if self.hidden_size is not None and self.model is not None:
            raise OptionError("--hidden-size is of the tiny model, and --model has its own. Leave one of them out.")
        for name, owner in _OF_ANOTHER.items():
            if getattr(self, owner) is None and getattr(self, name) != Options.__dataclass_fields__[name].default:
                raise OptionError(
                    f"{flag(name)} is for {flag(owner)}, and there is none. Leave it out, or set {flag(owner)}."
                )
        rows = self.batch_size * self.num_generations
        batch = f"the {rows} completions of a step (--batch-size {self.batch_size} x --num-generations "
        batch += f"{self.num_generations})"
        _check(rows % self.num_minibatches == 0, "num_minibatches", self.num_minibatches, f"a divisor of {batch}")
        part = rows // self.num_minibatches
        what = batch if part == rows else f"the {part} completions of a minibatch"
        _check(part % self.gradient_accumulation_steps == 0, "gradient_accumulation_steps",
               self.gradient_accumulation_steps, f"a divisor of {what}")  # fmt: skip
        if self.eval_samples and not self.eval_every:
            raise OptionError("--eval-samples are sampled every --eval-every steps, which is 0. Raise it, or set "
                              "--eval-samples 0.")  # fmt: skip
        if self.beta and self.kl_to == "old" and self.updates == 1:
            raise OptionError(
                "--kl-to old acts from the second update on, and there is one. Raise --num-iterations or "
                "--num-minibatches, or set --beta 0."
            )
        if self.backend == "reference" and self.teacher is not None:
            raise OptionError("--backend reference is for GRPO. Set --backend torch, or leave --teacher out.")
        if self.backend == "reference" and self.loss_path == "linear":
            raise OptionError("--backend reference takes logits. Leave --loss-path out, or set --loss-path logits.")
        if self.logits_dtype == "float32" and self.loss_path != "linear":
            raise OptionError("--logits-dtype float32 is for a loss that makes the logits. Set --loss-path linear.")

    @property
    def max_steps(self) -> int:
        """The most GRPO steps there can be."""
        return MOST_STEPS if self.steps is None else self.steps

    @property
    def updates(self) -> int:
        """Optimizer steps per GRPO step."""
        return self.num_iterations * self.num_minibatches

    @property
    def rows_at_once(self) -> int:
        """Completions whose loss is computed in one call."""
        return self.batch_size * self.num_generations // (self.num_minibatches * self.gradient_accumulation_steps)

    def solved(self, rewards: Sequence[float]) -> bool:
        """Whether the rewards of the steps so far end the run; never with a given number of steps."""
        window = rewards[-REWARD_WINDOW:]
        return self.steps is None and len(window) == REWARD_WINDOW and sum(window) / REWARD_WINDOW >= SOLVED_REWARD

    def takes_hidden_states(self, max_completion_length: int, vocabulary: int) -> bool:
        """Whether the loss is that of hidden states and head."""
        if self.backend == "reference":
            return False
        positions = self.rows_at_once * (max_completion_length + 1)
        size = 2 if self.dtype == "bfloat16" else 4
        tensors = 2 if self.teacher is None else 3  # logits and their gradient; the teacher's
        fits = tensors * positions * vocabulary * size <= self.logits_budget_gib * 2**30
        return self.loss_path == "linear" or (self.loss_path == "auto" and not fits)

    def loss_config(self, max_completion_length: int) -> LossConfig:
        """The loss's part of the options."""
        own = {name: getattr(self, name) for name in LOSS_FIELDS}
        return LossConfig(**own, max_completion_length=max_completion_length)

    def torch_device(self) -> torch.device:
        """The device to train on.

        Raises:
            OptionError: torch does not know the device or cannot use it.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            probe = torch.zeros(1, device=self.device)
            probe.item()  # meta holds no numbers
            return probe.device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
            raise OptionError(f"--device {self.device} is not usable: {reason}. Try --device cpu.") from error

    def metrics_dir(self) -> Path:
        return Path(self.output_dir) / "grpo_metrics"

    def model_dir(self) -> Path:
        return Path(self.output_dir) / "model"

    def checkpoints_dir(self) -> Path:
        return Path(self.output_dir) / "checkpoints"


# Options that say something about another, and nothing without it.
_OF_ANOTHER = {"eval_dataset": "dataset", "held_out": "dataset", "prompt_field": "dataset", "answer_field": "dataset",
               "pad_token": "model", "teacher_beta": "teacher"}  # fmt: skip


def _check(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise OptionError(f"{flag(name)} must be {wanted}, got {value}.")

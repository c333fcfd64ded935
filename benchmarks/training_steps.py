"""Steps of TRL's trainers on a random policy whose completions are random ids: times, peaks of memory, logs.

Nothing is downloaded: the policy has the shape of a known model and random weights, the tokenizer is made here, and
the completions come from a rollout function. All else is the trainer's own: the stock one's, the fused one's, or that
of a trainer whose loss is a mean of the hidden states, which shows what the model takes without a loss.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import Failed, first_line, free_memory, is_out_of_memory
from benchmarks.random_policy import SEED, SHAPES, policy
from benchmarks.suite import ERROR, OOM
from grpo_kernels.integrations.head import body
from grpo_kernels.integrations.trl import FusedGRPOTrainer
from grpo_kernels.trainer.tokenizer import character_tokenizer

T = TypeVar("T")
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Setting:
    """What a trainer is given. Completions have no end of sequence: all B × T tokens count."""

    shape: str  # of SHAPES
    batch: int  # B, completions of a step, one group
    length: int  # T, tokens of a completion
    checkpointing: bool = False  # of gradients
    beta: float = 0.0  # not 0: with a reference model
    steps: int = 5  # of the optimiser
    learning_rate: float = 1e-6

    @property
    def name(self) -> str:
        how = "" if self.checkpointing else "no "
        return f"{self.shape}, {self.batch} x {self.length}, {how}checkpointing, beta {self.beta:g}, {self.steps} steps"


@dataclass(frozen=True)
class Run:
    """What a trainer's steps came to. Bytes are None on a CPU."""

    step_ms: list[float]  # each step: passes, loss, backward, optimiser, log; without the making of completions
    rollout_ms: float  # of all steps together: the making of completions, which is in no step
    peak_bytes: int | None  # of the whole run, beyond what was held before the model
    pass_bytes: int | None  # the same while passes, loss and backward ran
    losses: list[float]
    grad_norms: list[float]
    entropies: list[float]

    @property
    def counted_ms(self) -> list[float]:
        """The first step compiles kernels and makes the optimiser's state: it does not count beside others."""
        return self.step_ms[1:] or self.step_ms

    @property
    def median_ms(self) -> float:
        return statistics.median(self.counted_ms)


class Watch:
    """The clock and the peaks of one run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step_ms: list[float] = []
        self.rollout_ms = 0.0
        self.peak, self.pass_peak = 0, 0
        self.before = self._allocated()
        self._began = self._paused = 0.0
        self._take_peak()

    def now(self) -> float:
        """Milliseconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3

    def start(self) -> None:
        self._began, self._paused = self.now(), 0.0

    def stop(self) -> None:
        self.step_ms.append(self.now() - self._began - self._paused)
        self.rollout_ms += self._paused

    def not_counted(self, function: Callable[[], T]) -> T:
        began = self.now()
        result = function()
        self._paused += self.now() - began
        return result

    def pass_(self, function: Callable[[], T]) -> T:
        self._take_peak()
        result = function()
        self.pass_peak = max(self.pass_peak, self._take_peak())
        return result

    def bytes(self) -> tuple[int | None, int | None]:
        """(of the run, of its passes)"""
        self._take_peak()
        on_gpu = self.device.type == "cuda"
        return (self.peak - self.before, self.pass_peak - self.before) if on_gpu else (None, None)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _take_peak(self) -> int:
        """The peak since the last call."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.peak = max(self.peak, peak)
        return peak


class Marks(TrainerCallback):
    """A step lasts until its numbers have been logged: some trainers fetch them only then."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, *args, **kwargs) -> None:
        self.watch.start()

    def on_log(self, *args, logs: dict, **kwargs) -> None:
        if "loss" in logs:  # not the summary at the end
            self.watch.stop()


class Watched:
    """In front of a trainer class."""

    watch: Watch

    def training_step(self, *args, **kwargs):
        return self.watch.pass_(lambda: super(Watched, self).training_step(*args, **kwargs))

    def _generate(self, *args, **kwargs):
        return self.watch.not_counted(lambda: super(Watched, self)._generate(*args, **kwargs))


class ModelAlone(GRPOTrainer):
    """The model's own forward and backward: the loss is the mean of the last hidden states."""

    def _compute_loss(self, model, inputs):
        model = self.accelerator.unwrap_model(model)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with self.accelerator.autocast():
            loss = body(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.mean()
        if not model.config.tie_word_embeddings:
            loss = loss + model.lm_head.weight.mean()  # every loss leaves a gradient there
        return loss


MODEL_ALONE, STOCK, FUSED = "model alone", "TRL", "fused"
VERL, VERL_FUSED = "verl", "verl, fused"  # of benchmarks.verl_steps
TRAINERS: dict[str, type[GRPOTrainer]] = {MODEL_ALONE: ModelAlone, STOCK: GRPOTrainer, FUSED: FusedGRPOTrainer}


def random_rollouts(setting: Setting) -> Callable[[list, GRPOTrainer], dict[str, object]]:
    draw = torch.Generator().manual_seed(SEED)
    vocab = SHAPES[setting.shape]["vocab_size"]

    def rollout(prompts: list, trainer: GRPOTrainer) -> dict[str, object]:
        ids = torch.randint(2, vocab, (len(prompts), PROMPT_TOKENS + setting.length), generator=draw)
        prompt_ids, completion_ids = ids.split([PROMPT_TOKENS, setting.length], 1)
        return {"prompt_ids": prompt_ids.tolist(), "completion_ids": completion_ids.tolist(), "logprobs": None}

    return rollout


def random_rewards() -> Callable[..., list[float]]:
    draw = torch.Generator().manual_seed(SEED)

    def reward(completions: list, **kwargs) -> list[float]:
        return torch.rand(len(completions), generator=draw).tolist()

    return reward


def run(setting: Setting, trainer: str, device: torch.device) -> Run:
    """The steps of one of TRAINERS. Weights, completions and rewards are the same for each."""
    watch = Watch(device)
    with tempfile.TemporaryDirectory() as folder:
        model = policy(setting.shape, device)
        if setting.beta != 0:  # TRL loads the reference from where the policy says that it came from
            model.save_pretrained(folder)
            model.config._name_or_path = folder
        own = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=setting.batch, num_generations=setting.batch,
            max_completion_length=setting.length, gradient_checkpointing=setting.checkpointing, beta=setting.beta,
            max_steps=setting.steps, learning_rate=setting.learning_rate, lr_scheduler_type="constant",
            bf16=device.type == "cuda", use_cpu=device.type == "cpu", logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, seed=SEED,
        )  # fmt: skip
        cls = type(TRAINERS[trainer].__name__, (Watched, TRAINERS[trainer]), {"watch": watch})
        made = cls(
            model, random_rewards(), own, train_dataset=Dataset.from_dict({"prompt": ["0"] * setting.steps}),
            processing_class=character_tokenizer("0123456789"), rollout_func=random_rollouts(setting),
            callbacks=[Marks(watch)],
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        del model
        made.train()
    rows = [row for row in made.state.log_history if "loss" in row]
    series = {name: [row.get(name, float("nan")) for row in rows] for name in ("loss", "grad_norm", "entropy")}
    return Run(watch.step_ms, watch.rollout_ms, *watch.bytes(), *series.values())


def attempt(setting: Setting, trainer: str, device: torch.device) -> Run | Failed:
    """`run`, or why there is none. Its memory is free again either way."""
    found = _attempt(setting, trainer, device)
    try:
        gc.collect()  # trainers are in circles with their callbacks
        free_memory(device)
    except RuntimeError as error:  # a kernel has failed, and the device takes no more commands
        return found if isinstance(found, Failed) else _failed(error)
    return found


def host_waits(setting: Setting, trainer: str, device: torch.device) -> float | None:
    """How often per step the host waits for the GPU, as PyTorch warns of it, in a run of its own; None if that fails.

    The making of completions counts too, and what comes before the first step.
    """
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = attempt(setting, trainer, device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if isinstance(found, Failed):
        return None
    return sum("synchronizing CUDA operation" in str(each.message) for each in seen) / setting.steps


def _attempt(setting: Setting, trainer: str, device: torch.device) -> Run | Failed:
    try:
        if trainer in TRAINERS:
            return run(setting, trainer, device)
        from benchmarks import verl_steps  # where verl is asked for

        return verl_steps.run(setting, trainer, device)
    except Exception as error:  # a trainer that fails is a row of the table
        return _failed(error)  # the error's frames would hold on to the model


def _failed(error: Exception) -> Failed:
    if is_out_of_memory(error):
        return Failed(OOM, first_line(error))
    return Failed(ERROR, f"{type(error).__name__}: {first_line(error)}")


def missing_for_verl() -> list[str]:
    """What `benchmarks.verl_steps` needs and is not installed."""
    return [name for name in ("verl", "tensordict", "peft") if importlib.util.find_spec(name) is None]


def room(device: torch.device) -> int:
    """Bytes that tensors may still take on a GPU, if no gaps are left between them."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def take_workspaces(device: torch.device) -> None:
    """cuBLAS allocates its own in the first run otherwise, and keeps them: that is no trainer's memory."""
    if device.type == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            layer = torch.nn.Linear(256, 256, device=device, dtype=dtype)
            layer(torch.ones(256, 256, device=device, dtype=dtype, requires_grad=True)).sum().backward()
        torch.cuda.synchronize(device)

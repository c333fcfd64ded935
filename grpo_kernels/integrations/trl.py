"""TRL: `FusedGRPOTrainer` in the place of `trl.GRPOTrainer`, or `patch()` where the class is not yours to choose.

Replaced are the loss and its metrics (`_compute_loss`), and the passes that score completions under the old and the
reference policy (`_get_per_token_logps_and_entropies`). Generation, rewards, advantages and logging stay TRL's.

All of it happens inside the model's own forward, where TRL has its head too: DDP, FSDP and DeepSpeed prepare the
weights there, and wait for their gradients.
"""

import dataclasses
import functools
import inspect
import types
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
import trl
from packaging.version import Version
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from grpo_kernels.api.linear import fused_linear_grpo_loss, linear_token_logprobs
from grpo_kernels.api.logprobs import token_logprobs
from grpo_kernels.api.loss import LossOutput, fused_grpo_loss
from grpo_kernels.integrations.ahead import TokenCount
from grpo_kernels.integrations.head import HeadError, ModelHead, body, find_head, named_head
from grpo_kernels.integrations.trl_support import FIELD, _generate, _generate_and_score_completions, in_parts
from grpo_kernels.objective.config import LossConfig
from grpo_kernels.objective.metrics import combine

TESTED = "1.16"
LOSS_PATHS = ("auto", "linear", "logits")
# What TRL logs of its loss, under the names that it has here too.
LOGGED = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
          "clip_ratio/low_min", "clip_ratio/high_max", "cispo_clip_ratio", "vespo/phi_seq_mean")  # fmt: skip
GLOBAL_TOKENS = ("dapo", "cispo", "vespo")  # divided by the tokens of the whole batch
_OWN_MATHS = ("get_off_policy_mask", "get_gamma_weights", "get_high_entropy_mask")  # of TRL's loss
_METHODS = ("_compute_loss", "_get_per_token_logps_and_entropies", "_generate", "_generate_and_score_completions",
            "log")  # fmt: skip
_STOCK = {name: getattr(GRPOTrainer, name) for name in ("__init__", *_METHODS)}


class Seam:
    """Takes the place of the head in the model's forward: hands what the head would make logits of to ``score``."""

    def __init__(self, in_fp32: bool) -> None:
        self.in_fp32 = in_fp32
        self.num_tokens = 0  # T, of the pass that is running
        self.score: Callable[[dict], dict] | None = None

    def join(self, model: nn.Module, head: ModelHead | None) -> None:
        """Lets ``model(..., seam=self)`` return what ``score`` does; without ``seam`` the forward is what it was.

        ``head`` is the model's own: the reference may have another config. None: through logits.
        """
        plain = model.forward

        @functools.wraps(type(model).forward)  # generate() looks at the signature
        def forward(self, *args, seam=None, **kwargs):
            return plain(*args, **kwargs) if seam is None else seam.run(self, head, plain, *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    def run(
        self, model: nn.Module, head: ModelHead | None, plain: Callable, *args, labels=None, **inputs
    ) -> dict[str, torch.Tensor]:
        inputs["use_cache"] = False
        if head is None:
            if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
                inputs["logits_to_keep"] = self.num_tokens + 1
            outputs = plain(*args, **inputs)
            aux_loss = outputs.aux_loss if inputs.get("output_router_logits") else None
            states = {"logits": outputs.logits[:, -self.num_tokens - 1 :]}
        else:
            outputs = body(model)(*args, **inputs)
            aux_loss = _aux_loss(model, outputs, inputs) if inputs.get("output_router_logits") else None
            hidden = outputs.last_hidden_state[:, -self.num_tokens - 1 :]
            states = head.arguments(model, self._as_the_head_reads(hidden))
        return {**self._finish(states), "aux_loss": aux_loss}

    def _as_the_head_reads(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.in_fp32:
            return hidden.float()
        device = hidden.device.type
        return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden

    @torch.compiler.disable  # what is scored changes with each call, and nothing is left to compile
    def _finish(self, states: dict) -> dict[str, torch.Tensor]:
        return self.score(states)

    def around(self, model: nn.Module, num_tokens: int, score: Callable) -> Callable:
        """The model as TRL calls it in `_get_per_token_logps_and_entropies`: ``score(states, ids, mask)`` is run."""

        def call(input_ids, attention_mask, labels, fused_lm_head, **inputs):
            ids, mask = input_ids[:, -num_tokens:], attention_mask[:, -num_tokens:]
            self.num_tokens = num_tokens
            self.score = functools.partial(score, completion_ids=ids, mask=mask)
            try:
                return SimpleNamespace(**model(input_ids=input_ids, attention_mask=attention_mask, seam=self, **inputs))
            finally:
                self.score = None

        return call


def _aux_loss(model: nn.Module, outputs: object, inputs: dict) -> torch.Tensor:
    """The router's load-balancing loss, as TRL and transformers compute it of the router's logits."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(model, "num_experts", None) or config.num_experts
    return load_balancing_loss_func(
        outputs.router_logits, experts, config.num_experts_per_tok, inputs.get("attention_mask")
    )


def loss_config(trainer: GRPOTrainer, entropy_coef: float | None = None) -> LossConfig:
    """The loss of a trainer as it stands: callbacks may have changed its attributes since it was made."""
    own = {
        "epsilon": trainer.epsilon_low,
        **{name: getattr(trainer, name) for name in (
            "loss_type", "beta", "epsilon_high", "importance_sampling_level", "max_completion_length",
            "off_policy_mask_threshold", "top_entropy_quantile",
        )},
        "entropy_coef": 0.0,  # as is said below
        "use_adaptive_entropy": False,  # TRL's controller has set entropy_coef
        "use_vllm": False,  # TRL has made the importance weights
        "temperature": 1.0,  # the calls get it themselves
    }  # fmt: skip
    config = LossConfig.from_trl(SimpleNamespace(**{**vars(trainer.args), **own}))
    return dataclasses.replace(config, entropy_coef=entropy_coef)


def _get_per_token_logps_and_entropies(
    self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
):
    """TRL's own, of its arguments and results, with `linear_token_logprobs`, or `token_logprobs`."""
    stock = functools.partial(_STOCK["_get_per_token_logps_and_entropies"], self)
    if not hasattr(self, "_seam"):  # made before patch()
        return stock(model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs)
    support_of = in_parts(getattr(self, "_kept", None))

    def score(states: dict, completion_ids: torch.Tensor, mask: torch.Tensor) -> dict:
        score_tokens = token_logprobs if "logits" in states else linear_token_logprobs
        out = score_tokens(**states, completion_ids=completion_ids, mask=mask, temperature=self.temperature,
                           return_entropy=compute_entropy, support=support_of(len(mask)))  # fmt: skip
        return {"log_probs": out.logps, "entropy": out.entropy}

    model = self._seam.around(model, logits_to_keep, score)
    return stock(model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs)


def _compute_loss(self, model, inputs):
    """TRL's own, of its inputs, result and metrics."""
    if not hasattr(self, "_seam"):  # made before patch()
        return _STOCK["_compute_loss"](self, model, inputs)
    mode = "train" if self.model.training else "eval"
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    # In evaluation a batch is neither split nor accumulated.
    accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
    parts = self.accelerator.num_processes * (self.args.steps_per_generation if mode == "train" else 1)
    corrects = self.loss_type == "vespo" or (self.use_vllm and self.vllm_importance_sampling_correction)
    scale, num_items = 1.0 / accumulation, inputs["num_items_in_batch"].clamp(min=1.0) / parts
    coef = _entropy_coef(self)
    if self.loss_type in GLOBAL_TOKENS:
        part = num_items.clamp(max=1.0)  # TRL divides by less than one token, should it come to it, but not the bonus
        scale, coef = scale / part, coef and coef * part
    masks_off_policy = self.off_policy_mask_threshold is not None
    spans_ranks = self.top_entropy_quantile < 1.0 and self.accelerator.num_processes > 1
    arguments = {
        "advantages": inputs["advantages"],
        "old_logps": inputs.get("old_per_token_logps"),
        "ref_logps": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
        "completion_mask": mask,
        "importance_weights": inputs.get("importance_sampling_ratio") if corrects else None,
        "sampling_logps": inputs.get("sampling_per_token_logps") if masks_off_policy else None,
        "temperature": self.temperature,
        "num_items_in_batch": num_items,
        "loss_scale": scale,
        "data_group": torch.distributed.group.WORLD if spans_ranks else None,
        "return_entropy": True,
        "support": in_parts(inputs.get(FIELD))(len(mask)),
        "config": loss_config(self, coef),
    }
    out: LossOutput | None = None
    counted = TokenCount(mask)  # asked for now: the host would wait for the whole model after it

    def score(states: dict, completion_ids: torch.Tensor, mask: torch.Tensor) -> dict:
        nonlocal out
        if "logits" in states:
            out = fused_grpo_loss(**states, completion_ids=completion_ids, inplace=True, **arguments)  # nobody else's
        else:
            rows = counted.read()
            out = fused_linear_grpo_loss(**states, completion_ids=completion_ids, num_rows=rows, **arguments)
        return {"log_probs": out.logps, "entropy": out.entropy, "loss": out.loss}

    num_tokens = inputs["completion_ids"].shape[1]
    called = self._seam.around(model, num_tokens, score)
    kept = {}

    def keeps_loss(**model_inputs):
        kept["outputs"] = called(**model_inputs)
        return kept["outputs"]

    # TRL's method, for its way with images and the like; it runs the model once, on the whole batch.
    names = inspect.signature(_STOCK["_get_per_token_logps_and_entropies"]).parameters
    _, _, aux_loss = _STOCK["_get_per_token_logps_and_entropies"](
        self,
        keeps_loss,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        num_tokens,
        compute_entropy=True,
        compute_aux_loss=self.aux_loss_enabled,
        **{name: inputs[name] for name in names if name in inputs},
    )
    loss = kept["outputs"].loss
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
        self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss.detach()).mean())
    per_token = inputs["advantages"].dim() == 2 or self.importance_sampling_level == "token"
    _log_loss(self, mode, out, 1.0 if self.loss_type in GLOBAL_TOKENS else accumulation, per_token)
    if self._entropy_bonus_enabled and mode == "train":
        if self.use_adaptive_entropy:
            _adapt_entropy_coef(self, out.entropy, mask)
        if self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
    return loss


def _log_loss(trainer: GRPOTrainer, mode: str, out: LossOutput, accumulation: float, per_token: bool) -> None:
    """Metrics over all ranks, in one collective, as tensors: `log` fetches them. ``per_token``: a clip is a token's."""
    rows = trainer.accelerator.gather(torch.stack(list(out.sums.values()))[None])  # (processes, sums)
    ranks = [dict(zip(out.sums, row)) for row in rows]
    metrics = out.metrics if len(ranks) == 1 else combine(ranks)
    logged = trainer._metrics[mode]
    for name in LOGGED:
        if name in metrics:
            logged[name].append(metrics[name])
    if per_token:  # TRL leaves its extremes out of the log where no token counts
        none = torch.stack([rank["tokens"] for rank in ranks]).sum() == 0
        for name in ("clip_ratio/low_min", "clip_ratio/high_max"):
            if name in metrics:
                logged[name][-1] = metrics[name].masked_fill(none, torch.nan)
    if trainer._entropy_bonus_enabled:
        policy_loss = torch.stack([rank["policy_loss"] for rank in ranks])
        logged["policy_loss"].append(policy_loss.nanmean() * accumulation)


def _entropy_coef(trainer: GRPOTrainer) -> float | None:
    """Of the steps up to the next; TRL's controller lets the bonus rest while the entropy is above its target."""
    if not trainer._entropy_bonus_enabled:
        return None
    resting = trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target
    return 0.0 if resting else trainer.entropy_coef


def _adapt_entropy_coef(trainer: GRPOTrainer, entropy: torch.Tensor, mask: torch.Tensor) -> None:
    """TRL's controller: one step of the coefficient per optimizer step, by the entropy of all its micro-batches."""
    if trainer.top_entropy_quantile < 1.0:
        mask = mask * trainer.get_high_entropy_mask(entropy, mask, 1 - trainer.top_entropy_quantile)
    stats = torch.stack([torch.where(mask != 0, entropy, 0.0).sum(), mask.sum()])
    if trainer._entropy_window_stats is not None:
        stats = stats + trainer._entropy_window_stats
    trainer._entropy_window_stats = stats
    if not trainer.accelerator.sync_gradients:
        return
    total, count = trainer.accelerator.reduce(stats, reduction="sum").tolist()
    args = trainer.args
    trainer._last_world_entropy = total / max(count, 1.0)
    if trainer._last_world_entropy <= args.entropy_target:
        trainer.entropy_coef = min(trainer.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
    else:
        trainer.entropy_coef = max(trainer.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
    trainer._entropy_window_stats = None


def log(self, *args, **kwargs):
    """TRL's own; first fetches, at once, the numbers that have waited on the device."""
    lists = self._metrics["train" if self.model.training else "eval"].values()
    waiting = [(values, i) for values in lists for i, x in enumerate(values) if isinstance(x, torch.Tensor)]
    if waiting:
        numbers = torch.stack([values[i].double() for values, i in waiting]).tolist()
        for (values, i), number in zip(waiting, numbers):
            values[i] = number
    return _STOCK["log"](self, *args, **kwargs)


def attach(trainer: GRPOTrainer, loss_path: str = "auto") -> None:
    """Prepares a new trainer's models.

    Raises:
        ValueError: what was asked for cannot be served; the message names it, and says what to do.
    """
    if loss_path not in LOSS_PATHS:
        raise ValueError(f"loss_path must be one of {', '.join(map(repr, LOSS_PATHS))}, got {loss_path!r}.")
    if Version(trl.__version__) < Version(TESTED):
        raise ValueError(f"grpo_kernels needs TRL {TESTED}, and this is {trl.__version__}. Upgrade it.")
    if Version(trl.__version__).release[:2] != Version(TESTED).release:
        warnings.warn(f"grpo_kernels is tested with TRL {TESTED}, and this is {trl.__version__}. Compare a run with "
                      "trl.GRPOTrainer's before you rely on it.", stacklevel=4)  # fmt: skip
    own = {name: getattr(GRPOTrainer, name) for name in _OWN_MATHS}
    own["_get_per_token_logps_and_entropies"] = _get_per_token_logps_and_entropies
    fused = isinstance(trainer, FusedGRPOTrainer) or type(trainer)._compute_loss is _compute_loss
    trainer._replays = fused  # a loss of its own knows of no sampler's mask
    for name, method in own.items():
        if fused and getattr(type(trainer), name) is not method:
            raise ValueError(
                f"{type(trainer).__name__} overrides {name}, which the fused loss does not call. Remove the override, "
                "or use trl.GRPOTrainer."
            )
    loss_config(trainer, _entropy_coef(trainer))
    models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    models = [_inner(trainer.accelerator.unwrap_model(model)) for model in models]
    trainer._seam = Seam(trainer.args.cast_lm_head_to_fp32)
    head = _find_head(models[0], loss_path)
    for model in models:  # a reference that is prepared already cannot be tried out, and is of the same class
        trainer._seam.join(model, head and named_head(model))


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model, inside an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _find_head(model: nn.Module, loss_path: str) -> ModelHead | None:
    if loss_path == "logits":
        return None
    try:
        if is_deepspeed_zero3_enabled():
            raise HeadError("DeepSpeed ZeRO-3 partitions the head.")
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise HeadError("device_map splits the model, and its head may be elsewhere than the completions.")
        return find_head(model)
    except HeadError as error:
        if loss_path == "linear":
            raise ValueError(f"loss_path='linear': {error} Use loss_path='logits'.") from None
        warnings.warn(f"The loss goes through logits, since {error} loss_path='logits' says so without this warning.",
                      stacklevel=5)  # fmt: skip
        return None


class FusedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the fused losses; same arguments, same logs.

    Args:
        loss_path: ``"linear"``: from hidden states and the head, a chunk of logits at a time; ``"logits"``: from
            logits, which are overwritten by their gradient; ``"auto"``: linear, if the model's head is understood.
        *args, **kwargs: of `trl.GRPOTrainer`.

    Raises:
        ValueError: a setting that cannot be served; the message names it, and says what to do.
    """

    def __init__(self, *args, loss_path: str = "auto", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        attach(self, loss_path)

    _compute_loss = _compute_loss
    _get_per_token_logps_and_entropies = _get_per_token_logps_and_entropies
    _generate = _generate
    _generate_and_score_completions = _generate_and_score_completions
    log = log


def patch(loss_path: str = "auto") -> Callable[[], None]:
    """Makes every `trl.GRPOTrainer` made from now on, subclasses included, compute its loss as `FusedGRPOTrainer`.

    A subclass that overrides `_compute_loss` keeps its own, and so does a trainer that was made before.

    Args:
        loss_path: as in `FusedGRPOTrainer`.

    Returns:
        A function that undoes it.
    """

    @functools.wraps(_STOCK["__init__"])
    def init(self, *args, **kwargs):
        _STOCK["__init__"](self, *args, **kwargs)
        if not isinstance(self, FusedGRPOTrainer):
            attach(self, loss_path)

    def undo() -> None:
        for name, method in _STOCK.items():
            setattr(GRPOTrainer, name, method)

    GRPOTrainer.__init__ = init
    for name in _METHODS:
        setattr(GRPOTrainer, name, globals()[name])
    return undo

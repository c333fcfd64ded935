"""The cases of `benchmarks.smoke`: every form of a call that users meet, one line each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
QWEN, LLAMA, GEMMA, GPT2 = 151936, 128256, 262144, 50257


@dataclass(frozen=True)
class Case:
    what: str
    V: int = QWEN
    dtype: torch.dtype = BF16
    kind: str = "loss"  # "logps", "head", "head logps", "policy", "parts"; "distil", "head distil"
    layout: str = "padded"  # "extra": (B, T+1, V); "packed": (N, V)
    masked: bool = True
    old: bool = True
    spoil: str = ""  # "inf", "rare", "nan", "id": what is odd about the logits or ids
    upstream: float = 1.0
    backward: bool = True
    bias: bool = False
    top: int = 0  # of a distillation: how many tokens the teacher tells; 0: all
    told: torch.dtype | None = None  # and the dtype of its logits; None: the student's
    tokens: int = 8  # of each of four sequences
    kept: int = 0  # ids that each row's sampler kept, its own among them; 0: no support
    dense: bool = False  # the support as a mask
    gather: bool = False  # of the head only what supports name
    rows: str = ""  # GRPO_KERNELS_ROWS
    how: str = ""  # "graph": captured and replayed; "compile": by torch.compile
    small: bool = False  # runs without a GPU, interpreted
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        dtype = {BF16: "bf16", FP32: "fp32", FP16: "fp16"}[self.dtype]
        return f"{self.what:39} {dtype} {self.V:>6}"

    @property
    def packed(self) -> bool:
        return self.layout == "packed"

    @property
    def head(self) -> bool:
        return self.kind.startswith("head")

    @property
    def metrics(self) -> bool:
        """Whether they can be compared: not where a row is NaN, nor where rows were skipped."""
        return self.spoil not in ("nan", "id") and not self.options.get("skip_zero_advantage")


def case(what: str, V: int = QWEN, dtype: torch.dtype = BF16, **rest) -> Case:
    own = {name: rest.pop(name) for name in list(rest) if name in Case.__dataclass_fields__}
    if dtype == FP16:
        own.setdefault("upstream", 1024.0)  # as loss scalers have it: without one fp16 loses most of a gradient
    return Case(what, V, dtype, options=rest, **own)


def on_chip_cases() -> list[Case]:
    """With more rows than there are programs, so that a program's next row is on its way while it writes one."""
    full = {"beta": 0.04}

    def on_chip(what: str, V: int, **rest) -> Case:
        return case(f"on chip: {what}", V, rows="onchip", tokens=120 if V == 32000 else 40, **rest)

    found = []
    for V in (QWEN, LLAMA, 32000):
        found += [
            on_chip("in place, KL k3", V, inplace=True, **full),
            on_chip("packed", V, layout="packed", **full),
            on_chip("rewards, in place", V, num_generations=2, inplace=True, **full),
            on_chip("entropies and bonus", V, return_entropy=True, entropy_coef=0.01),
        ]
    return [
        *found,
        on_chip("(B, T+1, V), in place", QWEN, layout="extra", inplace=True),
        on_chip("tokens of probability e^-200", QWEN, spoil="rare", return_entropy=True, **full),
        on_chip("a NaN row, in place", 32000, spoil="nan", inplace=True, **full),
        # Rows longer than a multiprocessor holds, and fp32.
        on_chip("in place, KL k3", GEMMA, inplace=True, **full),
        on_chip("in place", QWEN, dtype=FP32, inplace=True),
        on_chip("(B, T+1, V)", QWEN, dtype=FP32, layout="extra", **full),
        on_chip("entropies and bonus", QWEN, dtype=FP32, return_entropy=True, entropy_coef=0.01),
        on_chip("rare tokens, in place", QWEN, dtype=FP32, spoil="rare", inplace=True),
        on_chip("half masked, packed", GEMMA, layout="packed"),
    ]


def support_cases() -> list[Case]:
    full = {"beta": 0.04}
    return [
        case("support: 64 ids", kept=64, **full),
        case("support: 64 ids, entropies, bonus", kept=64, return_entropy=True, entropy_coef=0.01),
        case("support: 4096 ids, in place", kept=4096, inplace=True, **full),
        case("support: 4096 ids, gspo", GPT2, kept=4096, loss_type="gspo"),
        case("support: 64 ids, packed", 32000, FP32, kept=64, layout="packed", **full),
        case("support: 20 ids, (B, T+1, V)", 131, FP32, small=True, kept=20, layout="extra", **full),
        case("support: mask", kept=4096, dense=True, return_entropy=True, **full),
        case("support: mask, in place", GPT2, kept=64, dense=True, inplace=True),
        case("support: mask, gspo", 32000, FP16, kept=64, dense=True, loss_type="gspo"),
        case("log-probs: support, forward", kind="logps", kept=64, backward=False, return_entropy=True),
        case("log-probs: support, and backward", GPT2, kind="logps", kept=512, return_entropy=True),
        case("log-probs: mask, and backward", kind="logps", kept=64, dense=True),
        case("head: support", 32000, kind="head", kept=64, chunk_bytes=10 * 64000, **full),
        case("log-probs: two parts, support", kind="parts", kept=64, return_entropy=True),
        case(
            "log-probs: two parts, mask", 131, FP32, small=True, kind="parts", return_entropy=True, kept=20, dense=True
        ),
        case("head: support, gathered", 32000, kind="head", kept=64, gather=True, **full),
        case("head: support, gathered", 131, FP32, small=True, kind="head", kept=20, gather=True, loss_type="gspo"),
        case("head log-probs: mask", 131, FP32, kind="head logps", kept=20, dense=True),
    ]


def distillation_cases() -> list[Case]:
    def distil(what: str, V: int = QWEN, dtype: torch.dtype = BF16, beta: float = 1.0, kind="distil", **rest) -> Case:
        return case(f"{kind}: {what}", V, dtype, kind=kind, beta=beta, **rest)

    betas = {"forward": 0.0, "reverse": 1.0, "mixed": 0.3}
    teachers = {"": {}, ", top 32": {"top": 32, "tail": True}, ", top 32 alone": {"top": 32, "tail": False},
                ", top 32 as is": {"top": 32, "tail": None}}  # fmt: skip
    cases = [distil(name + teacher, V, dtype, beta, small=(V, teacher) == (131, "") and beta < 1, **options)
             for V, dtype in ((QWEN, BF16), (32000, BF16), (131, FP32))
             for name, beta in betas.items() for teacher, options in teachers.items()
             if beta == 0 or teacher != ", top 32 as is"]  # fmt: skip
    return [
        *cases,
        *(distil(f"{name}, in place", V, BF16, beta, inplace=True)
          for V in (QWEN, GPT2) for name, beta in betas.items()),
        distil("top 32, in place", inplace=True, top=32),
        distil("top 32 alone, in place", GPT2, inplace=True, top=32, tail=False),
        distil("forward", GPT2, FP32, 0.0),
        distil("mixed, fp16", 32000, FP16, 0.3),
        distil("teacher in fp32", told=FP32),
        distil("teacher in fp32", GPT2, beta=0.3, told=FP32),
        distil("(B, T+1, V)", layout="extra"),
        distil("packed", GPT2, layout="packed"),
        distil("packed, top 32", layout="packed", top=32),
        distil("temperatures (B,)", temperature="sequences"),
        distil("temperature 0.7, no mask", beta=0.3, temperature=0.7, masked=False),
        distil("reduction none", reduction="none"),
        distil("no reduction, top 32, in place", 131, FP32, small=True, reduction="none", top=32, inplace=True),
        distil("half a vocabulary of -inf", beta=0.3, spoil="inf"),
        distil("upstream 3", upstream=3.0),
        distil("without gradient", backward=False, beta=0.3),
        distil("CUDA graph", how="graph"),
        distil("reverse", kind="head distil"),
        distil("mixed, chunks, bias", 32000, beta=0.3, kind="head distil", bias=True, chunk_bytes=20 * 64000),
        distil("forward, soft cap", 32000, BF16, 0.0, kind="head distil", logit_scale=0.5, softcap=5.0),
        distil("fp16, scale, soft cap", 131, FP16, small=True, kind="head distil", logit_scale=0.5, softcap=5.0),
        distil("top 32", 32000, kind="head distil", top=32),
        distil("top 32 alone", 131, FP32, kind="head distil", top=32, tail=False),
    ]  # fmt: skip


def fp32_logits_cases() -> list[Case]:
    """fp32 logits of hidden states and a head in half precision."""
    full, fp32, chunk = {"beta": 0.04}, {"logits_dtype": FP32}, 10 * 32000 * 6
    return [
        case("head: fp32 logits", kind="head", **full, **fp32),
        case("head: fp32 logits, chunks, bias", 32000, kind="head", bias=True, chunk_bytes=chunk, **full, **fp32),
        case("head: fp32 logits, gspo", GPT2, kind="head", loss_type="gspo", return_entropy=True, **fp32),
        case("head: fp32 logits, fp16, soft cap", 131, FP16, small=True, kind="head", softcap=5.0, **full, **fp32),
        case("head: fp32 logits, gathered", 32000, kind="head", kept=64, gather=True, bias=True, **full, **fp32),
        case("head log-probs: fp32 logits", kind="head logps", backward=False, return_entropy=True, **fp32),
        case("head log-probs: fp32 logits, backward", 32000, FP16, kind="head logps", **fp32),
        case("head distil: fp32 logits", 32000, kind="head distil", beta=0.3, **fp32),
        case("head distil: fp32 logits, top 32", kind="head distil", beta=1.0, top=32, **fp32),
    ]


def all_cases(with_compile: bool = False) -> list[Case]:
    full = {"beta": 0.04}
    cases = [case("loss: grpo, KL k3", V, dtype, small=(V, dtype) == (131, BF16), **full)
             for V in (QWEN, LLAMA, GPT2, 32000, 131) for dtype in (BF16, FP32, FP16)]  # fmt: skip
    cases += [case("loss: in place", V, BF16, inplace=True, **full) for V in (QWEN, LLAMA, GPT2, 32000)]
    cases += [case("loss: in place", V, FP32, inplace=True, **full) for V in (QWEN, 131)]
    cases += [case("loss: sequence level (gspo)", V, dtype, small=V == 131, loss_type="gspo", **full)
              for V, dtype in ((QWEN, BF16), (QWEN, FP32), (GPT2, BF16), (131, FP16))]  # fmt: skip
    cases += [
        case("loss: sequence level, in place", loss_type="gspo", inplace=True),
        case("loss: gspo-token", 131, FP32, importance_sampling_level="sequence_token"),
        case("loss: (B, T+1, V)", layout="extra", **full),
        case("loss: (B, T+1, V)", GPT2, layout="extra", **full),
        case("loss: (B, T+1, V), in place", 131, FP32, layout="extra", inplace=True),
        case("loss: packed", layout="packed", **full),
        case("loss: packed, in place", GPT2, layout="packed", inplace=True),
        case("loss: packed, sequence level", 131, FP32, small=True, layout="packed", loss_type="gspo", **full),
        case("loss: no mask, on policy", masked=False, old=False),
        case("loss: entropies", return_entropy=True),
        case("loss: entropies and bonus", return_entropy=True, entropy_coef=0.01),
        case("loss: entropies and bonus", 131, FP32, small=True, return_entropy=True, entropy_coef=0.01, inplace=True),
        case("loss: entropies, fp16, bonus", 32000, FP16, return_entropy=True, entropy_coef=0.01),
        case("loss: KL k3, bias correction", use_bias_correction_kl=True, **full),
        case("loss: KL k3, clamped", 131, FP32, kl_clamp=0.05, **full),
        case("loss: KL k1", 131, FP32, kl_estimator="k1", **full),
        case("loss: KL k2, packed", 131, layout="packed", kl_estimator="k2", **full),
        case("loss: rewards in the launch", num_generations=2, **full),
        case("loss: rewards, spread of the batch", 131, FP32, num_generations=2, scale_rewards="batch"),
        case("loss: temperature 0.7", temperature=0.7, **full),
        case("loss: temperatures (B,)", temperature="sequences", **full),
        case("loss: temperatures (B, T), gspo", 131, FP32, temperature="tokens", loss_type="gspo"),
        case("loss: dapo, num_items, loss_scale", loss_type="dapo", num_items_in_batch=True, loss_scale=0.5),
        case("loss: delta, dual clip", 131, FP32, delta=1.3, dual_clip=1.2),
        *(case(f"loss: {name}", 131, FP32, loss_type=name, **full)
          for name in ("cispo", "sapo", "vespo", "gmpo", "fipo")),
        case("loss: packed, fipo", 131, FP32, small=True, layout="packed", loss_type="fipo", fipo_clip_range=None),
        case("loss: reduction none", reduction="none", **full),
        case("loss: reduction none, gspo", 131, FP32, reduction="none", loss_type="gspo", inplace=True),
        case("loss: skip_zero_advantage", skip_zero_advantage=True),
        case("loss: skip_zero_advantage, gspo", 131, FP32, skip_zero_advantage=True, loss_type="gspo"),
        case("loss: top entropy half of the tokens", 32000, top_entropy_quantile=0.5, return_entropy=True),
        case("loss: sampling correction, off-policy", 131, FP32, small=True, sampling_correction="token_truncate",
             off_policy_mask_threshold=0.01),
        case("loss: correction of on-policy sequences", 131, FP32, sampling_correction="sequence_mask",
             old=False),
        case("loss: half a vocabulary of -inf", spoil="inf", return_entropy=True, **full),
        case("loss: half a vocabulary of -inf", GPT2, FP32, spoil="inf", loss_type="gspo"),
        case("loss: tokens of probability e^-200", spoil="rare", return_entropy=True, **full),
        case("loss: a NaN row", spoil="nan", **full),
        case("loss: a NaN row, gspo", GPT2, spoil="nan", loss_type="gspo", reduction="none"),
        case("loss: an id out of range", spoil="id", **full),
        case("loss: upstream 3", upstream=3.0, **full),
        case("loss: upstream 3, in place", 131, FP32, upstream=3.0, inplace=True, **full),
        case("loss: without gradient", backward=False, return_entropy=True, **full),
        case("policy_loss: from log-probs", 32000, kind="policy", **full),
    ]  # fmt: skip
    for V, dtype in ((QWEN, BF16), (QWEN, FP32), (LLAMA, BF16), (GPT2, BF16), (32000, FP16), (131, FP32)):
        cases += [
            case("log-probs: forward", V, dtype, kind="logps", backward=False),
            case("log-probs: forward, entropies", V, dtype, kind="logps", backward=False, return_entropy=True),
        ]
    cases += [
        case("log-probs: and backward", kind="logps"),
        case("log-probs: and backward, entropies", kind="logps", return_entropy=True),
        case("log-probs: and backward, temperatures", GPT2, kind="logps", return_entropy=True, temperature="tokens"),
        case("log-probs: and backward, packed", 131, FP32, small=True, kind="logps", layout="packed", temperature=0.7),
        case("log-probs: half a vocabulary of -inf", kind="logps", spoil="inf", return_entropy=True),
        case("log-probs: e^-200", kind="logps", spoil="rare", return_entropy=True),
        case("log-probs: a NaN row", kind="logps", spoil="nan", return_entropy=True),
        case("log-probs: two parts of a vocabulary", kind="parts", return_entropy=True),
        case("head: grpo, KL k3", kind="head", **full),
        case("head: grpo, KL k3, chunks, bias", 32000, kind="head", bias=True, chunk_bytes=10 * 64000, **full),
        case("head: sequence level (gspo)", 32000, FP32, kind="head", loss_type="gspo", return_entropy=True),
        case("head: a suffix (fipo)", 131, FP32, kind="head", loss_type="fipo", delta=1.5),
        case("head: fp16, scale, soft cap", 131, FP16, small=True, kind="head", logit_scale=0.5, softcap=5.0, **full),
        case("head: soft cap", 32000, kind="head", logit_scale=0.5, softcap=5.0, **full),
        case("head: bias, entropy bonus", 131, FP32, kind="head", bias=True, entropy_coef=0.01, **full),
        *fp32_logits_cases(),
        case("head log-probs: forward, entropies", kind="head logps", backward=False, return_entropy=True),
        case("head log-probs: and backward", GPT2, kind="head logps"),
        case("loss: CUDA graph", how="graph", **full),
        case("loss: CUDA graph, gspo", GPT2, how="graph", loss_type="gspo"),
        *support_cases(),
        *distillation_cases(),
        *on_chip_cases(),
    ]
    if with_compile:
        cases += [
            case("loss: torch.compile", how="compile", **full),
            case("loss: torch.compile, gspo", how="compile", loss_type="gspo", **full),
            case("distil: torch.compile", how="compile", kind="distil"),
        ]
    return cases

"""The launches that `benchmarks.compile_report` compiles: recorded on small CPU tensors, as the package makes them."""

import contextlib
import enum
import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks import compile_distillation
from grpo_kernels.objective.batch import Batch
from grpo_kernels.objective.catalogue import KL_ESTIMATORS, TERMS
from grpo_kernels.objective.corrections import CORRECTIONS
from grpo_kernels.objective.plan import Plan
from grpo_kernels.triton_backend import distillation_launch, launch

KERNELS = (
    "logprob_kernel", "loss_kernel", "slope_kernel", "scale_kernel", "sequence_kernel", "total_kernel", "spread_kernel",
    "suffix_kernel", "correction_kernel", "segments_kernel", "groups_kernel", "batch_std_kernel", "threshold_kernel",
    "unite_kernel",
    *compile_distillation.KERNELS,
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = ("gradient_shape", "logprob_shape", "block_shape")
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "num_ctas", "enable_fp_fusion")


ALONE = "k3"  # the divergence that stands for all where not each is compiled in every form


class Extent(enum.Enum):
    """Which launches are recorded.

    A term, a divergence or a correction is a few instructions of a token. So a brief record has each of them in
    one launch of every kernel that holds it, and all other forms with the clipped term and ALONE; a representative one
    has no other term and divergence, and one correction.
    """

    EVERY = "every"
    BRIEF = "brief"
    REPRESENTATIVE = "representative"


class Launch(NamedTuple):
    """A recorded launch: the kernel and its arguments by name."""

    label: str
    kernel: object
    arguments: dict
    options: dict


class Recorder:
    def __init__(self, kernel, launches: list, label: str) -> None:
        self.kernel, self.launches, self.label = kernel, launches, label

    def __getitem__(self, grid):
        def record(*args, **kwargs) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            arguments = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
            self.launches.append(Launch(f"{self.kernel.fn.__name__} {self.label}", self.kernel, arguments, options))

        return record


@contextlib.contextmanager
def recording(launches: list, label: str, wave: int) -> Iterator[None]:
    """Launches are recorded instead of run, with the tile shapes of a GPU of this wave size."""
    with contextlib.ExitStack() as patches:
        for module, name in itertools.product((launch, distillation_launch), (*KERNELS, *SHAPES)):
            if was := getattr(module, name, None):
                now = functools.partial(was, wave=wave) if name in SHAPES else Recorder(was, launches, label)
                patches.enter_context(mock.patch.object(module, name, now))
        # as on a GPU, for tensors that lie on the CPU
        patches.enter_context(mock.patch.object(launch, "line_bytes", lambda x: 128))
        yield


def repeats_loops(label: str) -> bool:
    """Whether another term's or divergence's launch, by its label, has the same loops over a row."""
    kernel, term, form, which, *_ = (*label.split(), "", "", "")
    return kernel == "loss_kernel" and (term != "clipped" or (form == "KL" and which != ALONE))


def record_launches(V: int, dtype: str, wave: int, extent: Extent = Extent.EVERY) -> list[Launch]:
    """Each kernel in its leanest form (fewest inputs), its fullest, and with every term and KL: see `Extent`."""
    B, T = 2, 2
    logits = torch.zeros(B, T, V, dtype=DTYPES[dtype])
    ids = torch.zeros(B, T, dtype=torch.int64)
    token, sequence, one = torch.zeros(B, T), torch.zeros(B), torch.ones(())
    column = sequence[:, None]
    lean = Batch(ids, adv=column)
    weighted = lean._replace(mask=ids, old=token, count=sequence)
    full = weighted._replace(ref=token, adv=None, rewards=sequence, is_weight=column, temperature=column,
                             loss_scale=one, tokens=one, batch_std=one)  # fmt: skip
    tokens = torch.zeros(1, B * T)
    row, flat_ids = logits.reshape(1, B * T, V), ids.reshape(1, B * T)
    cu, segments = torch.zeros(B + 1, dtype=torch.int32), torch.zeros(B * T, dtype=torch.int32)
    packed = Batch(flat_ids, flat_ids, tokens, tokens, tokens, column, None, None, column, count=sequence, cu=cu,
                   segments=segments)  # fmt: skip
    own = {name: term.of_sequence for name, term in TERMS.items()}
    launches: list[Launch] = []

    calls = ("loss", "logprobs", "objective", "totals", "slope")
    every, least = extent is Extent.EVERY, extent is Extent.REPRESENTATIVE
    some = ("loss",) if least else calls

    def run(label, batch, plan, entropy=False, softcap=torch.inf, calls=calls, read=None):
        batch = batch._replace(term=(1.0,) * len(TERMS[plan.term].kind._fields), softcap=softcap)
        x = logits if batch.cu is None else row
        read = x if read is None else read
        with recording(launches, f"{plan.term} {label} {dtype}", wave):
            if plan.one_launch and "loss" in calls:
                launch.loss(read, x, batch, plan, entropy)
            if "logprobs" in calls:
                launch.logprobs(read, batch, plan, entropy)
            logps = torch.zeros(batch.ids.shape)
            entropies = logps if entropy else None
            if "objective" in calls:
                launch.objective(logps, entropies, batch, plan)
            if "totals" in calls:
                launch.totals(logps, entropies, batch, plan)
            if "slope" in calls:
                launch.slope(read, x, batch, torch.zeros(logps.numel(), 3), logps, entropies, one)

    for name in ("clipped",) if least else TERMS:
        whole = every or name == "clipped"
        if whole:
            run("lean", lean, Plan(term=name))
        run("old", weighted, Plan(term=name), calls=calls if whole else ("loss",))
        level = "token" if own[name] or "dppo" in name else "sequence"
        plan = Plan(term=name, level=level, off_policy=True, clip_once=True)
        run("sequence", weighted, plan, calls=calls if whole else ("objective",))
    for name in (ALONE,) if least else KL_ESTIMATORS:
        run(f"KL {name}", full, Plan(term="clipped", kl=name, bias=True, scale_rewards="batch"),
            calls=calls if every or name == ALONE else ("loss", "logprobs", "slope"))  # fmt: skip
    full_plan = Plan(term="clipped", kl="k3", bias=True, scale_rewards="batch", bonus=True)
    run("full", full, full_plan, entropy=True)
    run("full sequence", full._replace(sampling=token, threshold=one, wanted=token),
        full_plan._replace(level="sequence", quantile=True, off_policy=True), entropy=True)  # fmt: skip
    for name in list(CORRECTIONS)[: 1 if least else None]:
        run(f"full {name}", full._replace(sampling=token, threshold=one),
            full_plan._replace(level="sequence", off_policy=True, correction=name), entropy=True,
            calls=calls if every else ("objective",))  # fmt: skip
    run("groups", full._replace(ref=None, groups=segments.view(2, B)), Plan(term="clipped", scale_rewards="group"),
        calls=some)  # fmt: skip
    run("softcap", weighted, Plan(term="clipped"), softcap=30.0)
    run("softcap full", full, full_plan, entropy=True, softcap=30.0)
    run("skip", full._replace(ref=None), Plan(term="clipped", scale_rewards="group", skip=True), calls=some)
    if dtype != "fp32":  # of a head in half precision
        if every:
            run("fp32 logits", weighted, Plan(term="clipped"), read=logits.float())
        run("fp32 logits full", full, full_plan, entropy=True, calls=("loss", "logprobs", "slope"), read=logits.float())
    run("packed", packed, full_plan._replace(scale_rewards="none"), entropy=True)
    run("packed sequence", packed, Plan(term="clipped", level="sequence"), calls=("objective",) if least else calls)
    lists = {"support": flat_ids[0], "support_first": ids, "support_last": ids}
    run("support full", full._replace(**lists), full_plan, entropy=True)
    if wave == 32:  # on gfx942 this form spills 13 registers (Triton 3.7.1), with tiles that can be no smaller
        run("mask full", full._replace(support_mask=torch.zeros(logits.shape, dtype=torch.bool)), full_plan, True)
    if not least:
        run("weights once", full._replace(ref=None), Plan(term="vespo", scale_rewards="group", weight_once=True))
    run("places", packed._replace(places=torch.arange(B * T)[None]), Plan(term="fipo"), calls=("objective",))
    with recording(launches, dtype, wave):
        launch.scale(logits, logits, one)
        for up, bounds in ((None, None), (token, None), (None, cu)):
            launch.join(*(tokens if bounds is not None else token for _ in range(3)), up, bounds)
        for correction in CORRECTIONS.values():
            launch.correct(token, full._replace(sampling=token), correction)
        launch.segments(flat_ids, cu, B * T)
        launch.groups(cu, B)
        launch.batch_std(sequence, True)
        for batch in (lean, full, packed._replace(temperature=column)):
            for entropy in (False, True) if every else (batch is not lean,):
                launch.unite(torch.zeros(2, 4 * B * T), batch, entropy)
                launch.shard(logits if batch.cu is None else row, batch, Plan(skip=not entropy), entropy)
        launch.threshold(segments.float(), segments.float(), 0.5)
    for label, run in compile_distillation.calls(logits, every):
        with recording(launches, f"{label} {dtype}", wave):
            run()
    seen = {}
    for each in launches:
        if least and compile_distillation.left_out(each.label):
            continue
        seen.setdefault((each.kernel, str(signature(each))), each)
    return list(seen.values())


def signature(each: Launch) -> tuple[dict, dict, dict]:
    """(types, constants, alignment hints) as Triton's own launcher would derive them."""
    types, constants, hints = {}, {}, {}
    parameters = inspect.signature(each.kernel.fn).parameters
    free = {p.name: p.do_not_specialize for p in each.kernel.params}
    for place, (name, parameter) in enumerate(parameters.items()):
        value = each.arguments[name]
        annotation = getattr(parameter.annotation, "name", "")
        if value is None or each.kernel.params[place].is_constexpr:
            types[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = _POINTERS[value.dtype]
        elif isinstance(value, tuple):
            types[name] = type(value)(*("fp32",) * len(value))
        elif isinstance(value, float) or annotation == "fp32":
            types[name] = "fp32"
        else:
            types[name] = "i64" if annotation == "int64" else "i32"
            if not free[name] and value % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
    return types, constants, hints

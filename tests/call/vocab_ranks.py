"""One rank of a vocabulary in parts, for test_vocab_parallel.py: ``python -m vocab_ranks RANK WORLD STORE``.

Every rank holds some columns of the same logits. Loss, metrics and log-probabilities must be those of the whole
logits in float64, on every rank, and the gradient its own columns of theirs.
"""

import os
import sys
import traceback
from contextlib import suppress

import torch
import torch.distributed as dist

import reference
import variation
from benchmarks.interpreter import hasten
from cases import assert_outputs, expected, make_case
from grpo_kernels import Support, fused_grpo_loss, token_logprobs
from grpo_kernels.objective.catalogue import LOSS_TYPES
from support_cases import make_rows, make_support, near, restricted
from tolerance import assert_within, bounds, logprob_bounds

V = 37
BOUNDS = {2: (0, 20, 37), 3: (0, 5, 35, 37)}  # parts of different sizes
PADDED = ("completion_ids", "completion_mask", "old_logps", "ref_logps", "advantages")


def mine(logits):
    """This rank's columns of the logits, or of their gradient."""
    bounds, rank = BOUNDS[dist.get_world_size()], dist.get_rank()
    return logits[..., bounds[rank] : bounds[rank + 1]]


def loss_of(logits, backend, upstream=None, **kwargs):
    """(LossOutput, gradient) of this rank's part."""
    leaf = mine(logits).detach().clone().requires_grad_()
    out = fused_grpo_loss(leaf * 1, **kwargs, backend=backend, vocab_group=dist.group.WORLD)
    up = torch.ones_like(out.loss) if upstream is None else upstream.float()
    return out, torch.autograd.grad(out.loss, leaf, up)[0]


def check(logits, backend, upstream=None, **kwargs):
    out, grad = loss_of(logits, backend, upstream, **kwargs)
    want, want_grad = expected(logits, upstream=upstream, **kwargs)
    allowed = bounds(logits, upstream=upstream, **kwargs)
    assert_outputs(out, want, allowed)
    assert_within(grad, mine(want_grad), mine(allowed.grad), "gradient")
    every = [torch.empty_like(out.loss) for _ in range(dist.get_world_size())]
    dist.all_gather(every, out.loss.detach())
    assert all(torch.equal(x, every[0]) for x in every)
    return out, grad


def loss_types():
    """Every loss type, with a KL; the logits large, and scaled by a temperature."""
    for k, loss_type in enumerate(LOSS_TYPES):
        case = make_case(V=V, seed=k, spread=3.0, extra=k % 2)
        more = {"max_completion_length": 7} if loss_type == "dr_grpo" else {}
        check(case.logits, "torch", **case.inputs(*PADDED), loss_type=loss_type, beta=0.1, temperature=0.7, **more)


def knobs():
    """Entropies, a bonus, a quantile, sequences, temperatures per token, weights, rewards, a loss per token."""
    case = make_case(V=V, seed=30)
    common = case.inputs(*PADDED)
    heat = torch.linspace(0.5, 1.5, 20).view(4, 5)
    rewards = {k: v for k, v in common.items() if k != "advantages"} | {"rewards": case.rewards, "num_generations": 2}
    for backend in ("torch", "triton"):
        check(case.logits, backend, **common, return_entropy=True, entropy_coef=0.1, temperature=heat)
        check(case.logits, backend, **common, importance_sampling_level="sequence", top_entropy_quantile=0.6)
        check(case.logits, backend, **rewards, importance_weights=case.importance_weights, loss_type="dapo")
        up = torch.rand(4, 5).double()
        check(case.logits, backend, up, **common, reduction="none", temperature=heat[:, 0].clone())


def dtypes():
    """Half precision is rounded once; in place, too."""
    for dtype in (torch.bfloat16, torch.float16):
        case = make_case(V=V, seed=31, dtype=dtype)
        for backend in ("torch", "triton"):
            check(case.logits, backend, **case.inputs(*PADDED), beta=0.05)
            out, grad = loss_of(case.logits, backend, **case.inputs(*PADDED), beta=0.05)
            again = loss_of(case.logits, backend, **case.inputs(*PADDED), beta=0.05, inplace=True)
            allowed = bounds(case.logits, **case.inputs(*PADDED), beta=0.05)  # the rows of both start elsewhere
            assert_within(again[0].loss, out.loss, allowed.loss, "loss in place", factor=2)
            assert_within(again[1], grad, mine(allowed.grad), "gradient in place", factor=2)


def packed():
    case = make_case(V=V, seed=32)
    flat = {name: value.flatten() for name, value in case.inputs(*PADDED[:-1]).items()}
    flat |= {"advantages": case.advantages, "cu_seqlens": torch.tensor([0, 3, 3, 12, 20])}
    logits = case.logits.flatten(0, 1)
    for backend in ("torch", "triton"):
        check(logits, backend, **flat, loss_type="gspo", temperature=torch.tensor([0.5, 1.0, 2.0, 0.8]))
        check(logits, backend, **flat, return_entropy=True)
        check(logits, backend, **flat, loss_type="fipo", fipo_decay_rate=2.0)


def like_the_whole(logits, backend, **kwargs):
    """The same loss, log-probabilities and entropies as from whole logits."""
    out, grad = loss_of(logits, backend, **kwargs, return_entropy=True)
    whole = fused_grpo_loss(logits, **kwargs, return_entropy=True, backend=backend)
    tokens, given = slice(None), dict(kwargs)
    if "cu_seqlens" in kwargs:  # those after the last sequence have no bounds
        tokens = slice(int(kwargs["cu_seqlens"][-1]))
        given |= {name: kwargs[name][tokens] for name in PADDED[:-1]}
    allowed = bounds(logits[tokens].nan_to_num(0.0), **given)
    assert_within(out.loss, whole.loss, allowed.loss, "loss", factor=2)
    for name in ("logps", "entropy"):
        got, want = getattr(out, name)[tokens], getattr(whole, name)[tokens]
        assert_within(got, want, getattr(allowed, name), name, factor=2)
    return out, grad


def unvalidated():
    """What only a GPU lets pass: tokens of no sequence, and anything as the temperature of a masked token."""
    os.environ["GRPO_KERNELS_VALIDATE"] = "0"
    case = make_case(V=V, seed=38)
    flat = {name: value.flatten() for name, value in case.inputs(*PADDED[:-1]).items()}
    flat |= {"advantages": case.advantages, "cu_seqlens": torch.tensor([0, 3, 3, 12, 17])}
    heat = torch.full((4, 5), 0.7)
    heat[~case.completion_mask] = torch.tensor([0.0, torch.nan]).repeat(10)[: int((~case.completion_mask).sum())]
    for backend in ("torch", "triton"):
        like_the_whole(case.logits.flatten(0, 1), backend, **flat, temperature=torch.tensor([0.5, 1.0, 2.0, 0.8]))
        out, _ = like_the_whole(case.logits, backend, **case.inputs(*PADDED), temperature=heat)
        assert out.logps.isfinite().all()
    del os.environ["GRPO_KERNELS_VALIDATE"]


def autocast():
    """Entropies add up in fp32 all the same; ids may be of any integer dtype."""
    case = make_case(V=V, seed=39)
    inputs = case.inputs(*PADDED) | {"return_entropy": True, "entropy_coef": 0.1}
    want, want_grad = expected(case.logits, **inputs)
    for dtype in (torch.int32, torch.int16):
        inputs["completion_ids"] = case.completion_ids.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out, grad = loss_of(case.logits, "torch", **inputs)
        allowed = bounds(case.logits, **inputs)
        assert_outputs(out, want, allowed)
        assert_within(grad, mine(want_grad), mine(allowed.grad), "gradient")


def skipped():
    """Rows that are masked or of advantage 0 are not read, and say so as they do with whole logits."""
    case = make_case(V=V, seed=33)
    case.advantages[0] = 0.0
    inputs = case.inputs(*PADDED[:-2], "advantages")
    logits = case.logits.clone()
    logits[~case.completion_mask] = torch.nan
    for backend in ("torch", "triton"):
        gate = {**inputs, "advantages": case.token_advantages * (case.advantages != 0.0)[:, None]}
        like_the_whole(logits, backend, **gate, loss_type="gspo", skip_zero_advantage=True)
        _, grad = like_the_whole(logits, backend, **inputs, skip_zero_advantage=True)
        assert not grad[~case.completion_mask].any() and not grad[0].any() and grad[1].any()


def banned():
    """−inf logits, also where they fill a part; a NaN in one part reaches all of them; large logits stay exact."""
    case = make_case(V=V, seed=34)
    logits = case.logits.clone()
    logits[..., 30:] = -torch.inf  # with three ranks all of the last part
    sampled = case.completion_mask.nonzero()[0].tolist()
    case.completion_ids[case.completion_ids >= 30] = 4
    inputs = case.inputs("completion_ids", "completion_mask", "advantages")
    for backend in ("torch", "triton"):
        check(logits, backend, **inputs, return_entropy=True, entropy_coef=0.1)
        check(logits + 4096.0, backend, **inputs)
        seq, tok = sampled
        ids = case.completion_ids.clone()
        ids[seq, tok] = 36  # banned, and sampled all the same: its ratio is 0, as with whole logits
        found = {**inputs, "completion_ids": ids, "old_logps": case.old_logps}
        whole = fused_grpo_loss(logits, **found, backend=backend)
        out, _ = loss_of(logits, backend, **found)
        assert whole.logps[seq, tok] == -torch.inf
        usual = bounds(logits, **{**inputs, "old_logps": case.old_logps})  # the banned token has none
        assert_within(out.logps, whole.logps, usual.logps, "logps", factor=2)
        assert_within(out.loss, whole.loss, usual.loss, "loss", factor=2)
        broken = logits.clone()
        broken[seq, tok, 7] = torch.nan
        out, grad = loss_of(broken, backend, **inputs)
        assert out.loss.isnan() and out.logps[seq, tok].isnan() and grad[seq, tok].isnan().all()


def logprobs():
    """`token_logprobs` and its gradient by both of its outputs."""
    case = make_case(V=V, seed=35, extra=1)
    ids, mask = case.completion_ids.clamp(min=0), case.completion_mask
    for backend in ("torch", "triton"):
        x, y = mine(case.logits).clone().requires_grad_(), case.logits.double().requires_grad_()
        out = token_logprobs(x, ids, mask=mask, temperature=0.9, return_entropy=True, vocab_group=dist.group.WORLD,
                             backend=backend)  # fmt: skip
        p = torch.log_softmax(y[:, :-1] / 0.9, -1)
        lp, H = p.gather(-1, ids[..., None])[..., 0] * mask, -(p.exp() * p).sum(-1) * mask
        objective = lambda lp, H: lp.sin().sum() + (H**2).sum()  # noqa: E731
        allowed = logprob_bounds(case.logits, ids, mask, 0.9, objective)
        assert_within(out.logps, lp, allowed.logps, "logps")
        assert_within(out.entropy, H, allowed.entropy, "entropy")
        objective(out.logps, out.entropy).backward()
        objective(lp, H).backward()
        assert_within(x.grad, mine(y.grad), mine(allowed.grad), "gradient")
        with torch.no_grad():
            quiet = token_logprobs(x, ids, mask=mask, temperature=0.9, vocab_group=dist.group.WORLD, backend=backend)
        assert torch.equal(quiet.logps, out.logps.detach())


def supported(**kwargs):
    """(case, lists of ids per token): sets of every kind, wholly on the first rank or the last, and without an id."""
    case = make_case(T=8, V=V, **kwargs)
    rows = make_rows(case, V, 0)
    first, last = case.completion_mask[0].nonzero()[:2, 0].tolist()  # the sets of these lie where the token does not
    case.completion_ids[0, first], rows[first] = V - 1, [0, 2]
    case.completion_ids[0, last], rows[last] = 1, [V - 1, V - 2]
    near(case, rows)
    return case, rows


def of_rank(case, rows, form):
    """The support as this rank passes it: ids whole, a mask in part."""
    support = make_support(form, rows, (4, 8, V), case.completion_mask)
    return support if form == "Support" else mine(support)


def check_support(case, rows, form, backend, flat=None, upstream=None, **kwargs):
    """Against the reference, and against whole logits; ``flat``: packed input in place of the case's."""
    given = kwargs | (flat or case.inputs(*PADDED))
    given_logits, narrow = (x.flatten(0, 1) if flat else x for x in (case.logits, restricted(case.logits, case, rows)))
    support = of_rank(case, rows, form)
    if flat and form == "mask":
        support = support.flatten(0, 1)
    out, grad = loss_of(given_logits, backend, upstream, support=support, **given)
    want, want_grad = expected(given_logits, upstream=upstream, support=rows, **given)
    allowed = bounds(narrow, upstream=upstream, **given)
    assert_outputs(out, want, allowed)
    assert_within(grad, mine(want_grad), mine(allowed.grad), "gradient")
    left = mine(narrow) == -torch.inf
    assert (grad[left] == 0.0).all() and left.any()
    other, other_grad = loss_of(given_logits.masked_fill(narrow == -torch.inf, torch.nan), backend, upstream,
                                support=support, **given)  # fmt: skip
    assert torch.equal(out.loss, other.loss) and torch.equal(grad, other_grad)  # what is left out is not used
    whole = Support.from_lists(rows)
    alone = fused_grpo_loss(given_logits, support=whole, backend=backend, **given)
    assert_within(out.loss, alone.loss, allowed.loss, "loss", factor=2)
    assert_within(out.logps, alone.logps, allowed.logps, "logps", factor=2)


def supports():
    """Over the sampler's kept sets: ids of the whole vocabulary, or a mask of this rank's columns."""
    heat = torch.linspace(0.5, 1.5, 32).view(4, 8)
    for backend in ("torch", "triton"):
        for form in ("Support", "mask"):
            case, rows = supported(seed=41, extra=1)
            check_support(case, rows, form, backend, beta=0.1, return_entropy=True, entropy_coef=0.1, temperature=heat)
            check_support(case, rows, form, backend, loss_type="gspo", inplace=True, entropy_coef=0.1)
            check_support(case, rows, form, backend, upstream=torch.rand(4, 8).double(), reduction="none")
            case.logits += 4096.0
            check_support(case, rows, form, backend, beta=0.1)


def supports_packed():
    for dtype in (torch.float32, torch.bfloat16):
        case, rows = supported(seed=42, dtype=dtype)
        flat = {name: value.flatten() for name, value in case.inputs(*PADDED[:-1]).items()}
        flat |= {"advantages": case.advantages, "cu_seqlens": torch.tensor([0, 8, 8, 23, 32])}
        for backend in ("torch", "triton"):
            for form in ("Support", "mask"):
                check_support(case, rows, form, backend, flat, return_entropy=True, entropy_coef=0.1, inplace=True)


def supports_of_logprobs():
    case, rows = supported(seed=43, spread=2.0, extra=1)
    ids, mask = case.completion_ids, case.completion_mask
    objective = lambda lp, H: lp.sin().sum() + (H**2).sum()  # noqa: E731
    y = case.logits.double().requires_grad_()
    lp, H = reference.token_logprobs(y, ids, 0.9, mask, rows)
    objective(lp, H).backward()
    allowed = logprob_bounds(restricted(case.logits, case, rows), ids, mask, 0.9, objective)
    for backend in ("torch", "triton"):
        for form in ("Support", "mask"):
            x = mine(case.logits).clone().requires_grad_()
            out = token_logprobs(x, ids, mask=mask, temperature=0.9, support=of_rank(case, rows, form),
                                 return_entropy=True, vocab_group=dist.group.WORLD, backend=backend)  # fmt: skip
            assert_within(out.logps, lp, allowed.logps, "logps")
            assert_within(out.entropy, H, allowed.entropy, "entropy")
            objective(out.logps, out.entropy).backward()
            assert_within(x.grad, mine(y.grad), mine(allowed.grad), "gradient")


def supports_outside():
    """An id that no rank has: an IndexError where values are checked, else its row is NaN, and no other."""
    case, rows = supported(seed=44)
    inputs = case.inputs(*PADDED)
    at = int(case.completion_mask[0].nonzero()[0])
    for strange in (V, -1, 2**31 - 1):
        support = Support.from_lists([[0, strange] if n == at else row for n, row in enumerate(rows)])
        for backend in ("torch", "triton"):
            os.environ["GRPO_KERNELS_VALIDATE"] = "1"
            try:
                loss_of(case.logits, backend, support=support, **inputs)
                raise AssertionError("an id outside of the vocabulary was accepted")
            except IndexError as error:
                assert f"row {at} of support has the id {strange}, which is outside the vocabulary of 37" in str(error)
            os.environ["GRPO_KERNELS_VALIDATE"] = "0"
            out, grad = loss_of(case.logits, backend, support=support, return_entropy=True, **inputs)
            bad = torch.zeros(4, 8, dtype=torch.bool)
            bad[0, at] = True
            assert torch.equal(out.logps.isnan(), bad) and torch.equal(out.entropy.isnan(), bad)
            assert grad[0, at].isnan().all() and not grad[~bad].isnan().any()
    del os.environ["GRPO_KERNELS_VALIDATE"]


def refused():
    """An id outside the whole vocabulary, and parts of different tokens, on every rank."""
    case = make_case(V=V, seed=36)
    group = dist.group.WORLD
    ids = case.completion_ids.clone()
    ids[0, 0], case.completion_mask[0, 0] = V, True
    mask, adv = case.completion_mask, case.advantages
    shorter = slice(None) if dist.get_rank() else slice(0, 3)
    wrong = (
        (IndexError, "outside the vocabulary of 37", (mine(case.logits), ids, adv), {"completion_mask": mask}),
        (ValueError, "Each must have", (mine(case.logits)[shorter], ids.clamp(0, 5)[shorter], adv[shorter]), {}),
        (TypeError, "vocab_group must be", (mine(case.logits), ids, adv), {"vocab_group": 2}),
    )
    for error, words, arguments, more in wrong:
        try:
            fused_grpo_loss(*arguments, **{"vocab_group": group} | more)
            raise AssertionError(f"accepted, wanted: {words}")
        except error as raised:
            assert words in str(raised), raised


def compiled():
    """A graph without breaks, with the exchange in it."""
    case = make_case(V=V, seed=37)
    inputs = case.inputs(*PADDED)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        return fused_grpo_loss(x, **inputs, beta=0.1, vocab_group=dist.group.WORLD).loss

    leaf = mine(case.logits).clone().requires_grad_()
    with variation.unshifted():
        (grad,) = torch.autograd.grad(run(leaf), leaf)
    _, want_grad = expected(case.logits, **inputs, beta=0.1)
    assert_within(grad, mine(want_grad), mine(bounds(case.logits, **inputs, beta=0.1).grad), "gradient")


def supports_compiled():
    """The exchange of a mask is in the graph; so is an `IndexError`'s check, which must not break it."""
    case, rows = supported(seed=45)
    inputs = case.inputs(*PADDED)
    for form in ("Support", "mask"):
        support = of_rank(case, rows, form)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def run(x):
            return fused_grpo_loss(x, **inputs, support=support, vocab_group=dist.group.WORLD).loss  # noqa: B023

        leaf = mine(case.logits).clone().requires_grad_()
        with variation.unshifted():
            (grad,) = torch.autograd.grad(run(leaf), leaf)
        _, want_grad = expected(case.logits, **inputs, support=rows)
        allowed = bounds(restricted(case.logits, case, rows), **inputs).grad
        assert_within(grad, mine(want_grad), mine(allowed), "gradient")


# Two parts or three where it cannot matter to a check: what ranks do together is a sum, a maximum or a union.
TWO = (loss_types, knobs, dtypes, skipped, banned, unvalidated, autocast, compiled, supports_outside, supports_compiled)
THREE = (loss_types, knobs, packed, logprobs, supports, supports_packed, supports_of_logprobs, refused)
CHECKS = {world: {check.__name__: check for check in checks} for world, checks in ((2, TWO), (3, THREE))}


def main(rank: int, world: int, store: str) -> None:
    hasten()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for name, run in CHECKS[world].items():
        try:
            torch.manual_seed(0)
            run()
            print(f"passed: {name}", flush=True)
        except Exception:
            print(f"failed: {name}\n{traceback.format_exc()}", flush=True)
            os._exit(1)  # the other ranks may be anywhere: they are stopped from outside
    with suppress(Exception):
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an orderly exit, long after the last assertion


if __name__ == "__main__":
    variation.from_environment()
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

"""What the row kernels read and write: each logit once, its gradient once, and needless rows not at all.

Counted in Triton's interpreter, which executes every load and store one by one. "Read" and "written"
are distinct elements per launch, which is what HBM sees: the second pass over a row finds it on chip.
"""

import pytest
import torch

from cases import make_case
from counting import interpreted, launches
from grpo_kernels import fused_grpo_loss, token_logprobs
from grpo_kernels.objective.catalogue import TERMS
from term_table import facts

pytestmark = [interpreted, pytest.mark.unshifted]
FULL = ("completion_ids", "old_logps", "ref_logps")
SHAPES = ((2, 3, 131), (1, 1, 9001))  # one tile per row, and several with a ragged end


def unmasked(B=3, T=4, V=131, **kwargs):
    """A case in which every token counts and no ratio is clipped, so that every gradient row is needed."""
    case = make_case(B, T, V, extra=1, **kwargs)
    case.completion_ids.clamp_(min=0)
    lp = torch.log_softmax(case.logits[:, :T].float(), -1).gather(-1, case.completion_ids[..., None])[..., 0]
    case.old_logps, case.ref_logps = lp + 0.05, lp - 0.05
    return case


def step(logits, *, inplace=False, upstream=1.0, **kwargs):
    """(output, logits, gradient, launches that touched either) of a forward and a backward."""
    x = logits.clone().requires_grad_() * 1
    with launches() as seen:
        out = fused_grpo_loss(x, backend="triton", inplace=inplace, **kwargs)
        (grad,) = torch.autograd.grad(out.loss, x, torch.full_like(out.loss, upstream))
    assert (grad.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == inplace
    return out, x, grad, [launch for launch in seen if launch.touches(x) or launch.touches(grad)]


def rows_read(launch, x):
    """(B, rows): the share of each row that a launch read."""
    return (launch.reads(x) > 0).double().mean(-1)


def rows_written(launch, x):
    return (launch.writes(x) > 0).double().mean(-1)


# --- traffic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("full", (False, True), ids=("lean", "full"))
def test_one_launch_reads_logits_once_and_writes_the_gradient_once(dtype, shape, inplace, full):
    case = unmasked(*shape, dtype=dtype)
    T = shape[1]
    extra = {"beta": 0.1, "entropy_coef": 0.01, "return_entropy": True, "loss_type": "dapo"} if full else {}
    _, x, grad, touching = step(case.logits, inplace=inplace, **case.inputs(*FULL, "advantages"), **extra)
    (only,) = touching  # the backward, with upstream 1, moves nothing
    assert (rows_read(only, x)[:, :T] == 1).all()
    assert (rows_read(only, x)[:, T:] == 0).all()  # the position after the last token
    assert (rows_written(only, grad) == 1).all()
    assert only.reads(x).sum(-1).max() <= 2 * shape[2] + 1  # two passes and the token's own logit
    if not inplace:
        assert not only.writes(x).any() and not only.reads(grad).any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_gradient_logits_are_read_once_and_nothing_is_written(dtype, shape):
    case = unmasked(*shape, dtype=dtype)
    T, V = shape[1:]
    x = case.logits
    inputs = case.inputs(*FULL, "advantages")
    calls = {
        "no grad": lambda: fused_grpo_loss(x, backend="triton", **inputs, beta=0.1, return_entropy=True),
        "none": lambda: fused_grpo_loss(x, backend="triton", **inputs, reduction="none"),
        "logps": lambda: token_logprobs(x, case.completion_ids, backend="triton", return_entropy=True),
    }
    for name, call in calls.items():
        with launches() as seen:
            call()
        (only,) = [launch for launch in seen if launch.touches(x)]
        assert (only.reads(x)[:, :T].sum(-1) == V + 1).all(), name  # one pass and the token's own logit
        assert (rows_read(only, x)[:, :T] == 1).all() and (rows_read(only, x)[:, T:] == 0).all(), name
        assert not only.writes(x).any(), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "reduction", "inplace"),
    [(torch.float16, "mean", False), (torch.float32, "none", False), (torch.bfloat16, "none", True)],
    ids=str,
)
def test_two_launches_read_logits_twice_and_write_the_gradient_once(shape, dtype, reduction, inplace):
    case = unmasked(*shape, dtype=dtype)
    inputs = case.inputs(*FULL, "advantages")
    _, x, grad, touching = step(case.logits, inplace=inplace, **inputs, reduction=reduction, upstream=3.0)
    assert_two_launches(touching, x, grad, T=shape[1])


@pytest.mark.parametrize("entropy", (False, True))
def test_token_logprobs_read_logits_twice_and_write_the_gradient_once(entropy):
    case = unmasked()
    x = case.logits.requires_grad_()
    with launches() as seen:
        out = token_logprobs(x, case.completion_ids, return_entropy=entropy, backend="triton")
        (grad,) = torch.autograd.grad(out.logps.sum() + (out.entropy.sum() if entropy else 0.0), x)
    assert_two_launches([each for each in seen if each.touches(x) or each.touches(grad)], x, grad, T=4)


def assert_two_launches(touching, x, grad, T):
    first, second = touching
    for launch in touching:
        assert (rows_read(launch, x)[:, :T] == 1).all() and (rows_read(launch, x)[:, T:] == 0).all()
        assert launch.reads(x).sum(-1).max() <= x.shape[2] + 1  # one pass and the token's own logit
    assert not first.writes(grad).any() and (rows_written(second, grad) == 1).all()


def law_case(term, **kwargs):
    """A batch and keywords under which every row of a term has a gradient."""
    case = unmasked(**kwargs)
    names = ("completion_ids", "old_logps", "ref_logps", "importance_weights", "advantages")
    return case, {**case.inputs(*names), **facts(term).gentle}


@pytest.mark.parametrize(("term", "level"), [(name, level) for name, entry in TERMS.items() for level in entry.levels])
@pytest.mark.parametrize("inplace", (False, True))
def test_the_law_holds_for_every_term_and_level(inplace, term, level):
    """Token level: one launch, 1 read + 1 write; whatever needs its sequence: two launches, 2 reads + 1 write."""
    case, kwargs = law_case(term, dtype=torch.bfloat16)
    kwargs |= {"policy_term": term, "importance_sampling_level": level, "beta": 0.1, "use_bias_correction_kl": True}
    _, x, grad, touching = step(case.logits, inplace=inplace, **kwargs)
    if level == "token" and not TERMS[term].of_sequence:
        (only,) = touching
        assert (rows_read(only, x)[:, :4] == 1).all() and (rows_read(only, x)[:, 4:] == 0).all()
        assert (rows_written(only, grad) == 1).all()
    else:
        assert_two_launches(touching, x, grad, T=4)


TWO_LAUNCHES = {
    "off-policy mask": {"off_policy_mask_threshold": 9.0},
    "entropy quantile": {"top_entropy_quantile": 0.99, "entropy_coef": 0.1},
    "late correction": {"sampling_correction": "token_truncate", "old_logps": None},
}


@pytest.mark.parametrize("name", TWO_LAUNCHES)
def test_what_needs_the_log_probabilities_first_takes_two_launches(name):
    case, kwargs = law_case("clipped")
    kwargs |= {"sampling_logps": case.old_logps, "beta": 0.1, **TWO_LAUNCHES[name]}  # the KL needs every row
    if "late" in name:
        del kwargs["importance_weights"]
    _, x, grad, touching = step(case.logits, **kwargs)
    assert_two_launches(touching, x, grad, T=4)


@pytest.mark.parametrize("loss_type", ("grpo", "gspo"))
def test_the_law_holds_for_packed_input_and_temperatures(loss_type):
    case, kwargs = law_case("clipped")
    flat = {name: value.flatten(0, 1) for name, value in kwargs.items() if name != "advantages"}
    flat |= {"cu_seqlens": torch.tensor([0, 3, 4, 12]), "advantages": case.advantages, "loss_type": loss_type,
             "temperature": torch.linspace(0.5, 1.5, 12), "beta": 0.1}  # fmt: skip
    _, x, grad, touching = step(case.logits[:, :4].flatten(0, 1), **flat)
    assert len(touching) == (1 if loss_type == "grpo" else 2)
    for launch in touching:
        assert (rows_read(launch, x) == 1).all()
    assert (rows_written(touching[-1], grad) == 1).all()


@pytest.mark.parametrize("loss_type", ("gspo", "vespo", "fipo", "topr"))
def test_sequences_without_an_advantage_are_never_read(loss_type):
    case, kwargs = law_case("clipped")
    kwargs["advantages"] = torch.tensor([1.0, 0.0, -1.0])[:, None] * torch.tensor([1.0, 0.0, 1.0, 1.0])
    _, x, grad, touching = step(case.logits, **kwargs, loss_type=loss_type, skip_zero_advantage=True)
    for launch in touching:
        assert not rows_read(launch, x)[1].any()
    assert (rows_read(touching[0], x)[[0, 2], :4] == 1).all()  # a token without one counts for its sequence
    assert (rows_written(touching[-1], grad) == 1).all()


def test_upstream_gradient_moves_the_gradient_only_if_it_is_not_one():
    case = unmasked()
    _, x, grad, touching = step(case.logits, **case.inputs(*FULL, "advantages"), upstream=0.5)
    _, scaling = touching
    assert (rows_read(scaling, grad) == 1).all() and (rows_written(scaling, grad) == 1).all()
    assert not scaling.touches(x)


# --- skipping --------------------------------------------------------------------------------------

PATHS = {
    "one launch": {},
    "in place": {"inplace": True},
    "fp16": {"dtype": torch.float16},
    "none": {"reduction": "none"},
}


def path(name, case):
    """Keywords and logits of one way through the code."""
    kwargs = dict(PATHS[name])
    return case.logits.to(kwargs.pop("dtype", torch.float32)), kwargs


@pytest.mark.parametrize("name", PATHS)
def test_masked_rows_are_never_read(name):
    """Nor does what stands in them reach anything: here NaN, ids outside the vocabulary, infinite ratios."""
    case = unmasked()
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    case.logits[:, :4][~mask] = torch.nan
    case.completion_ids[~mask] = 10**12
    case.old_logps[~mask] = -torch.inf
    logits, kwargs = path(name, case)
    out, x, grad, touching = step(logits, **case.inputs(*FULL, "advantages"), completion_mask=mask, beta=0.1, **kwargs)
    for launch in touching:
        assert torch.equal(rows_read(launch, x)[:, :4], mask.double())
    written = torch.stack([launch.writes(grad) for launch in touching]).sum(0)[:, :4]
    assert (written[~mask] == 1).all()
    assert (grad[:, :4][~mask] == 0).all() and grad.isfinite().all() and out.loss.isfinite().all()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("why", ("clipped", "advantage 0", "equal rewards"))
def test_rows_without_a_gradient_skip_the_second_pass(name, why):
    case = unmasked()
    idle = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    given = {"advantages": torch.ones(3, 4)}
    if why == "clipped":
        case.old_logps[idle] -= 1.0  # ρ = e^0.95, above 1 + ε with A > 0
    elif why == "advantage 0":
        given["advantages"][idle] = 0.0
    else:
        idle[:] = True
        given = {"rewards": torch.full((3,), 0.7), "num_generations": 3}
    logits, kwargs = path(name, case)
    _, x, grad, touching = step(logits, **case.inputs("completion_ids", "old_logps"), **given, **kwargs)
    issued = torch.stack([launch.reads(x) for launch in touching]).sum(0).sum(-1)[:, :4]
    assert (issued[idle] == x.shape[2] + 1).all()  # one pass and the token's own logit
    assert (issued[~idle] > 2 * x.shape[2]).all()
    written = torch.stack([launch.writes(grad) for launch in touching]).sum(0)[:, :4]
    assert (written[idle] == 1).all() and (grad[:, :4][idle] == 0).all() and (grad[:, :4][~idle] != 0).any(-1).all()


@pytest.mark.parametrize("name", (*PATHS, "no grad"))
@pytest.mark.parametrize("given", ("advantages (B,)", "advantages (B, T)", "rewards"))
def test_skip_zero_advantage_leaves_rows_unread(name, given):
    case = unmasked(B=4)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 0] = False
    idle = torch.zeros(4, 4, dtype=torch.bool)
    if given == "rewards":
        inputs = {"rewards": torch.tensor([0.1, 0.9, 0.7, 0.7]), "num_generations": 2}
        idle[2:] = True
    else:
        idle[1:3] = True
        inputs = {"advantages": torch.ones(4, 4).masked_fill(idle, 0.0)}
        if given == "advantages (B,)":
            inputs = {"advantages": inputs["advantages"][:, 0]}
    inputs |= {"completion_ids": case.completion_ids, "old_logps": case.old_logps, "completion_mask": mask}
    if name == "no grad":
        with launches() as touching:
            out = fused_grpo_loss(case.logits, backend="triton", skip_zero_advantage=True, **inputs)
        x = case.logits
    else:
        logits, kwargs = path(name, case)
        out, x, grad, touching = step(logits, skip_zero_advantage=True, **inputs, **kwargs)
        written = torch.stack([launch.writes(grad) for launch in touching]).sum(0)[:, :4]
        assert (written[idle] == 1).all() and (grad[:, :4][idle] == 0).all()
    issued = torch.stack([launch.reads(x) for launch in touching]).sum(0).sum(-1)[:, :4]
    assert (issued[idle | ~mask] == 0).all() and (issued[~idle & mask] > x.shape[2]).all()
    assert torch.equal(out.logps.isnan(), idle & mask)


@pytest.mark.parametrize("name", PATHS)
def test_an_id_outside_the_vocabulary_is_never_an_address(name, monkeypatch):
    """Whatever is counted must lie within the tensors of the launch; the row turns NaN instead."""
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "0")
    case = unmasked()
    case.completion_ids[0, 0], case.completion_ids[1, 2], case.completion_ids[2, 3] = -1, 131, 2**40
    logits, kwargs = path(name, case)
    out, _, grad, _ = step(logits, **case.inputs(*FULL, "advantages"), **kwargs)
    bad = (case.completion_ids < 0) | (case.completion_ids >= 131)
    assert torch.equal(grad[:, :4].isnan().all(-1), bad) and torch.equal(grad[:, :4].isnan().any(-1), bad)
    assert torch.equal(out.logps.isnan(), bad) and out.loss.isnan().any()

"""The on-chip kernel where rows are longer than a multiprocessor holds, in fp32, and where programs draw their rows."""

import pytest
import torch

from cases import check, expected, make_case, ours

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with Triton 3.6")

from grpo_kernels.triton_backend import onchip_launch, ways
from onchip_chip import BF16, GIVEN, LINE, ON_GPU, Chip, body, check_case, spoil
from pretend_gpu import pretended
from tolerance import assert_within, bounds

FP32 = torch.float32
LONG = {  # slots, lines, lag, lines of the tiles that pass through registers
    "lag 0": (5, 1, 0, 1),
    "lag 1": (4, 1, 1, 1),
    "lag 2": (5, 2, 2, 1),
    "as wide as a slot": (5, 2, 3, 2),
    "narrow": (3, 4, 2, 1),
}
HELD = 2  # lines in registers
USUAL = {"slots": 3, "lag": 2, "held": HELD}
dtypes = pytest.mark.parametrize("dtype", (BF16, FP32), ids=("bf16", "fp32"))
pytestmark = pytest.mark.unshifted  # rows must start at multiples of 16 bytes


@pytest.fixture
def chip(monkeypatch):
    return Chip(monkeypatch).set(**USUAL)


def line(dtype):
    return LINE * 2 // dtype.itemsize


def long_case(dtype, tiles=6, slots=3, more=40, **kwargs):
    """A row of so many tiles of a line beyond the slots and registers."""
    return make_case(V=(slots + HELD + tiles) * line(dtype) + more, dtype=dtype, spread=3.0, **kwargs)


@body
@dtypes
@pytest.mark.parametrize("name", LONG)
def test_rows_of_any_length(chip, name, dtype):
    slots, lines, lag, width = LONG[name]
    chip.set(3, slots, lines, lag, held=HELD, width=width)
    found = set()
    for tiles in (0, 1, 3, 4, 5, 6, 11):
        more = 8 if tiles % 2 else -8
        V = (slots * lines + HELD + (tiles - (more > 0)) * width) * line(dtype) + more
        case = make_case(B=3, T=4, V=V, dtype=dtype, spread=3.0, seed=tiles, extra=tiles % 2)
        check_case(case, inplace=tiles % 2 == 1)
        found.add(chip.shape["PASSING"])
    assert found == {0, 4, 5, 6, 11}


@body
@dtypes
@pytest.mark.parametrize("tickets", (False, True))
@pytest.mark.parametrize("programs", (1, 2, 40))
def test_what_passes_through_is_read_twice_and_the_rest_once(chip, programs, tickets, dtype):
    chip.set(programs, tickets=tickets, **USUAL)
    case = long_case(dtype, B=3, T=4, extra=1)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).bool()
    given = case.inputs("completion_ids", "advantages", "old_logps") | {"completion_mask": mask}
    given["completion_ids"] = given["completion_ids"].clamp(min=0)
    given["old_logps"] = expected(case.logits, **given)[0].logps.float()  # no ratio is clipped
    check(case.logits, "triton", **given)
    V, shape = case.logits.shape[2], chip.shape
    rows = [m for m in chip.kernel.accesses.values() if m.flat.dtype == dtype and m.flat.numel() >= 15 * V]
    reads, writes = (sum(getattr(m, what)[: 15 * V].view(3, 5, V) for m in rows) for what in ("reads", "writes"))
    scored = torch.nn.functional.pad(mask, (0, 1))
    assert (reads[~scored] == 0).all() and (writes[~scored] == 1).all()
    ids = torch.nn.functional.pad(given["completion_ids"], (0, 1))[scored]
    token = torch.nn.functional.one_hot(ids, V)
    twice = torch.zeros(V, dtype=torch.long)
    twice[: (shape["PASSING"] - 4) * line(dtype)] = 1  # the last four stay in registers
    assert shape["PASSING"] == 7 and torch.equal(reads[scored].long(), 1 + token + twice)
    assert torch.equal(writes[scored].long(), 1 + token)


@body
@dtypes
@pytest.mark.parametrize("tickets", (False, True))
@pytest.mark.parametrize("programs", (1, 4))
def test_rows_without_a_gradient_between_live_ones(chip, programs, tickets, dtype):
    chip.set(programs, tickets=tickets, **USUAL)
    case = long_case(dtype, B=6, T=7)
    given = case.inputs("completion_ids", "advantages", "old_logps")
    given["completion_ids"] = given["completion_ids"].clamp(min=0)
    for share in (0.2, 0.5, 0.8):
        mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(int(10 * share))) < share
        check(case.logits, "triton", **given, completion_mask=mask, inplace=programs == 4)
    given["old_logps"] = case.old_logps.clone()
    given["old_logps"][:, 1::3] -= 2.0  # clipped, where advantages are positive
    check(case.logits, "triton", **given | {"advantages": torch.ones(6)})


FULL = ("completion_ids", "old_logps", "ref_logps", "importance_weights", "completion_mask", "advantages")


@body
@dtypes
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize(
    "options",
    ({"return_entropy": True, "beta": 0.1}, {"entropy_coef": 0.02}, {"temperature": 0.7, "loss_type": "cispo"}),
    ids=("entropies", "bonus", "temperature"),
)
def test_other_inputs(chip, options, inplace, dtype):
    case = long_case(dtype, extra=1)
    check(case.logits, "triton", **case.inputs(*FULL), **options, inplace=inplace)


ODD = ("token below 2^-64", "token at −inf", "NaN", "+inf", "huge logits")


@body
@dtypes
@pytest.mark.parametrize("tiles", (-2, 6))
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("name", ODD)
def test_rows_whose_sum_has_another_anchor(chip, name, inplace, tiles, dtype):
    case = long_case(dtype, tiles, B=3, T=4)
    ids = case.completion_ids.clamp(min=0)
    spoil(case, ids, name)
    given = {"completion_ids": ids, "advantages": torch.tensor([1.0, -1.0, 0.5])}
    if name in ("token below 2^-64", "huge logits"):
        check(case.logits, "triton", **given, inplace=inplace)
        return
    out, grad = ours(case.logits, "triton", **given, inplace=inplace)
    chip.monkeypatch.setenv(ways.VARIABLE, "triton")
    want, want_grad = ours(case.logits, "triton", **given)
    allowed = bounds(case.logits, **given)
    assert_within(grad, want_grad, allowed.grad, "gradient", factor=2)
    assert_within(out.logps, want.logps, allowed.logps, "logps", factor=2)


@body
@pytest.mark.parametrize("late", (1, 2))
@pytest.mark.parametrize("dtype", (BF16,))
def test_a_wrong_wait_is_seen(chip, dtype, late):
    chip.set(wait_group=lambda copies: lambda left: copies.wait(left + late), **USUAL)
    case = long_case(dtype)
    with pytest.raises(AssertionError, match=r"on its way|on their way"):
        ours(case.logits, "triton", **case.inputs(*GIVEN))


def test_shapes_of_long_rows():
    """A row that fits has no tiles that pass through, and everything has a place."""
    for itemsize, V in ((2, 151936), (2, 163840), (2, 200064), (2, 262144), (4, 32000), (4, 128256), (4, 151936)):
        for crowded in (False, True):
            s = onchip_launch.onchip_shape(V, crowded, itemsize)
            entries = 32 * s["WARPS"] * 16 // itemsize
            lines = s["S"] * s["K"] + s["PASSING"] * s["PK"]
            assert lines * entries < V <= (lines + s["D1"] + s["D2"] + s["D3"]) * entries
            assert s["PASSING"] == 0 if V * itemsize <= 327_680 else s["PASSING"] >= 4
            assert s["LAG"] <= s["S"] and s["S"] * s["K"] * s["WARPS"] * 512 <= 229_376


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_chip(monkeypatch):
    if not ON_GPU or pretended() or ways.device_obstacle(torch.empty(0, device="cuda")):
        pytest.skip("needs an NVIDIA GPU, sm_90 or newer with 227 KB of shared memory")
    monkeypatch.setenv(ways.VARIABLE, "onchip")


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize(("V", "dtype"), ((262144, BF16), (128256, FP32), (32000, FP32)))
def test_the_kernel_itself(real_chip, V, dtype, inplace):
    case = make_case(V=V, dtype=dtype, spread=3.0, B=4, T=120 if V == 32000 else 40, extra=1)
    check_case(case, inplace=inplace)


@pytest.mark.parametrize(("V", "dtype", "tokens"), ((32000, BF16, 300), (128256, FP32, 40)))
def test_the_kernel_itself_with_tickets(real_chip, monkeypatch, V, dtype, tokens):
    shape_of = onchip_launch._shape
    monkeypatch.setattr(onchip_launch, "_shape", lambda V, **given: shape_of(V, **given | {"tickets": True}))
    case = make_case(V=V, dtype=dtype, spread=3.0, B=4, T=tokens)
    check_case(case, inplace=True)

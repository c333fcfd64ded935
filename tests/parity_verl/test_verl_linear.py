"""The fused linear op in verl's place, against verl's own torch implementation and float64."""

import importlib.metadata
import sys
from types import ModuleType

import pytest
import torch

try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("verl is not installed; it gets an environment of its own: make test-verl", allow_module_level=True)
import verl_oracle  # noqa: F401  (imports verl, without Ray where there is none)
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers import dense_common
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as home

from grpo_kernels.integrations.verl import fused_linear_for_ppo, linear_cross_entropy, patch
from linear_tolerance import linear_logprob_bounds
from tolerance import U, assert_within, steps

STOCK, STOCK_OP = FusedLinearForPPO.forward, home.linear_cross_entropy
USES = {"log-probs": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (1.0, -0.3)}


@pytest.fixture
def patched():
    undo = patch()
    yield
    undo()


def make(shape=(3, 7), *, H=16, V=53, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, H, generator=g).to(dtype)
    weight = (torch.randn(V, H, generator=g) / 2).to(dtype)
    return hidden, weight, torch.randint(V, shape, generator=g)


def run(op, hidden, weight, ids, temperature=0.7, *, use="both", frozen=()):
    """Log-probs, entropies, and the gradients that a sum of them gives."""
    leaves = [x.detach().clone().requires_grad_(name not in frozen) for name, x in (("h", hidden), ("w", weight))]
    logps, entropy = op(*leaves, ids, temperature)
    g = torch.Generator().manual_seed(9)
    up, bonus = torch.randn(2, *logps.shape, generator=g).to(logps.device)
    of_logps, of_entropy = USES[use]
    terms = [w * (x * y).sum() for w, x, y in ((of_logps, up, logps), (of_entropy, bonus, entropy)) if w]
    sum(terms).backward()
    return logps.detach(), entropy.detach(), *(x.grad for x in leaves)


def verls(hidden, weight, ids, temperature):
    return STOCK(FusedLinearForPPO(chunk_size=4), hidden, weight, ids, temperature)


def exact(hidden, weight, ids, temperature):
    """float64, of the same numbers."""
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def allowed_to(hidden, weight, ids, temperature=0.7, use="both") -> tuple[torch.Tensor, ...]:
    """Of one fp32 computation: log-probs, entropies, and the gradients of `run`."""
    g = torch.Generator().manual_seed(9)
    up, bonus = torch.randn(2, *ids.shape, generator=g).double()
    of_logps, of_entropy = USES[use]
    flat = ids.view(1, -1)
    head = {"hidden": hidden.reshape(1, -1, hidden.shape[-1]), "weight": weight}
    outputs, (of_hidden, of_weight) = linear_logprob_bounds(
        head, flat, torch.ones_like(flat, dtype=torch.bool), temperature,
        lambda lp, H: of_logps * (up.view(1, -1) * lp).sum() + of_entropy * (bonus.view(1, -1) * H).sum(),
    )  # fmt: skip
    return outputs.logps.view_as(ids), outputs.entropy.view_as(ids), of_hidden.view_as(hidden), of_weight


def assert_same(ours, theirs, truth, allowed) -> None:
    """fp32: as verl's, and as float64's."""
    for a, b, c, most in zip(ours, theirs, truth, allowed):
        assert (a is None) == (b is None) == (c is None)
        if a is None:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        assert_within(a, c, most, "float64's")
        assert_within(a, b, most, "verl's", factor=2)


@pytest.mark.parametrize("frozen", ((), ("h",), ("w",)), ids=str)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", ((21,), (3, 7), (1, 1)), ids=str)
def test_as_verls_torch_implementation(shape, use, frozen):
    hidden, weight, ids = make(shape)
    double = (hidden.double(), weight.double(), ids)
    results = (run(op, *args, use=use, frozen=frozen) for op, args in (
        (fused_linear_for_ppo, (hidden, weight, ids)), (verls, (hidden, weight, ids)), (exact, double)))  # fmt: skip
    assert_same(*results, allowed_to(hidden, weight, ids, use=use))


@pytest.mark.parametrize("autocast", (False, True), ids=("bf16", "autocast"))
def test_half_precision_is_no_less_exact_than_verls(autocast):
    """Against float64 of the bf16 numbers: nowhere further off than verl's own."""
    hidden, weight, ids = make((4, 8), H=64, V=211, dtype=torch.bfloat16)
    truth = run(exact, hidden.double(), weight.double(), ids)
    if autocast:
        hidden, weight = hidden.float(), weight.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = run(fused_linear_for_ppo, hidden, weight, ids), run(verls, hidden, weight, ids)
    for a, b, c in zip(ours, theirs, truth):
        assert a.shape == b.shape and a.dtype == b.dtype
        off = [(x.double() - c).norm() / c.norm() for x in (a, b)]
        assert off[0] <= max(off[1].item(), 2**-9) * 1.05  # 2⁻⁹: bf16's own rounding


def test_autocast_casts_both():
    """As a product under autocast does, whatever comes: here the weight is in bf16 already."""
    hidden, weight, ids = make()
    want, _ = fused_linear_for_ppo(hidden.bfloat16(), weight.bfloat16(), ids)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            logps, entropy = fused_linear_for_ppo(hidden, weight.to(dtype), ids)
        assert torch.equal(logps, want) and entropy.dtype == torch.float32


def test_ids_of_another_integer_type():
    hidden, weight, ids = make()
    want = fused_linear_for_ppo(hidden, weight, ids)
    assert all(map(torch.equal, fused_linear_for_ppo(hidden, weight, ids.int()), want))


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
def test_linear_cross_entropy(reduction):
    """verl's has one row per token; it runs on a GPU alone, so the torch implementation stands for it."""
    hidden, weight, ids = make()
    logps, entropy = linear_cross_entropy(hidden, weight, ids, 0.7, reduction)
    want, want_entropy = verls(hidden, weight, ids, 0.7)
    most, of_entropy, *_ = allowed_to(hidden, weight, ids)
    total = most.sum() + steps(ids.numel()) * U * want.double().abs().sum()
    most = {"none": most.flatten(), "sum": total, "mean": total / ids.numel()}[reduction]
    want = {"none": want.flatten(), "sum": want.sum(), "mean": want.mean()}[reduction]
    assert_within(logps, want, most, "logps", factor=2)
    assert_within(entropy, want_entropy.flatten(), of_entropy.flatten(), "entropy", factor=2)
    assert logps.dtype == entropy.dtype == torch.float32


# --- In verl's models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=61, max_position_embeddings=32)  # fmt: skip
    return Qwen2ForCausalLM(config)


def through(model, forward, ids):
    model.zero_grad()
    out = forward(model, input_ids=ids, return_dict=True, temperature=0.7)
    (out.log_probs.sum() + 0.1 * out.entropy.sum()).backward()
    return out.log_probs.flatten(), out.entropy.flatten(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_in_a_model_that_verl_has_patched(backend, model, patched, monkeypatch):
    """verl's own forward of the model, with either of its backends; its triton one needs a GPU, ours does not."""
    ids = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(1))
    ours = through(model, getattr(dense_common, f"forward_with_{backend}_backend"), ids)
    monkeypatch.setattr(FusedLinearForPPO, "forward", STOCK)
    want = through(model, dense_common.forward_with_torch_backend, ids)
    # A model whose logits are all smaller than 1, and a layer's sums of up to 48 terms, forth and back
    for a, b in zip((*ours[:2], *ours[2].values()), (*want[:2], *want[2].values())):
        assert_within(a, b, 4 * steps(48) * U * (1 + b.abs().max()), "in the model", factor=2)


# --- patch() ---------------------------------------------------------------------------------------------


def test_patch_and_undo(monkeypatch):
    importer = ModuleType("verl.models.somewhere")  # as Megatron's modules import it, by name
    importer.linear_cross_entropy = STOCK_OP
    monkeypatch.setitem(sys.modules, importer.__name__, importer)
    undo, again = patch(), patch()
    assert home.linear_cross_entropy is importer.linear_cross_entropy is linear_cross_entropy
    assert FusedLinearForPPO.forward is not STOCK
    for _ in range(2):
        again()
        assert home.linear_cross_entropy is importer.linear_cross_entropy is STOCK_OP
        assert FusedLinearForPPO.forward is STOCK
        again = undo


def test_patched_class_keeps_its_arguments(patched):
    hidden, weight, ids = make()
    op = FusedLinearForPPO(chunk_size=2, impl_backend="torch")
    ours = op(hidden_states=hidden, vocab_weights=weight, input_ids=ids, temperature=0.7)
    for a, b, most in zip(ours, verls(hidden, weight, ids, 0.7), allowed_to(hidden, weight, ids)):
        assert_within(a, b, most, factor=2)

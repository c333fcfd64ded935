"""Bad input of the losses from hidden states: an error that names the argument, what came, and the remedy."""

import math

import pytest
import torch
from torch import nn

from grpo_kernels import fused_linear_grpo_loss, linear_token_logprobs
from linear_cases import B, H, T, V, batch
from linear_tolerance import linear_logprob_bounds
from tolerance import assert_within

META = torch.device("meta")


def lora():
    """As peft's layer looks: a module around the head, with matrices beside it, and the plain weight as its own."""
    layer = nn.Module()
    layer.base_layer, layer.weight, layer.bias = nn.Linear(H, V), nn.Parameter(torch.zeros(V, H)), None
    layer.lora_A = nn.ModuleDict()
    return layer


def lora_in_a_linear():
    layer = nn.Linear(H, V)
    layer.lora_A = nn.ModuleDict()
    return layer


def partitioned():
    """As DeepSpeed ZeRO-3 leaves a parameter outside of its module's forward."""
    weight = nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_shape = 7, (V, H)
    return weight


def partitioned_module():
    head = nn.Linear(H, V, bias=False)
    head.weight = partitioned()
    return head


def grad(x):
    return x.clone().requires_grad_()


def ids(x, **kwargs):
    return dict(completion_ids=x, **kwargs)


# Of both functions.
HEADS = [
    ("float64", lambda h, i: dict(hidden=h["hidden"].double()), TypeError, "hidden must be float32.*float64.*Cast"),
    ("no tensor", lambda h, i: dict(hidden=[1.0]), TypeError, "hidden must be a torch.Tensor, got list"),
    ("no weight", lambda h, i: dict(weight=None), TypeError, "weight must be a torch.Tensor, got NoneType"),
    ("hidden 2-D", lambda h, i: dict(hidden=h["hidden"][0]), ValueError, r"\(B, T\+1, H\) for.*\(5, 6\), got \(6, 9\)"),
    ("hidden batch", lambda h, i: dict(hidden=h["hidden"][:2]), ValueError, r"hidden must be.*got \(2, 6, 9\)"),
    ("hidden long", lambda h, i: dict(hidden=torch.cat([h["hidden"]] * 2, 1)), ValueError, "hidden must be"),
    ("no states", lambda h, i: dict(hidden=h["hidden"][..., :0]), ValueError, "states without an entry"),
    ("ids 3-D", lambda h, i: ids(i["completion_ids"][None]), ValueError, r"completion_ids must be \(B, T\), or packed"),
    ("float ids", lambda h, i: ids(i["completion_ids"].float()), TypeError, "completion_ids must be integers.*long"),
    ("ids a list", lambda h, i: ids([[1]]), TypeError, "completion_ids must be a torch.Tensor"),
    ("ids elsewhere", lambda h, i: ids(i["completion_ids"].to(META)), ValueError, "completion_ids is on meta.*Move"),
    ("id", lambda h, i: ids(i["completion_ids"].clamp(min=0) + V), IndexError, "outside the vocabulary of 37"),
    ("transposed", lambda h, i: dict(weight=h["weight"].T), ValueError, r"\(V, H\) with H = 9.*got \(9, 37\)"),
    ("weight 1-D", lambda h, i: dict(weight=h["weight"][0]), ValueError, r"weight must be \(V, H\)"),
    ("weight dtype", lambda h, i: dict(weight=h["weight"].half()), TypeError, r"weight is torch.float16.*weight.to\("),
    ("weight elsewhere", lambda h, i: dict(weight=h["weight"].to(META)), ValueError, "weight is on meta but hidden"),
    ("bias no tensor", lambda h, i: dict(bias=0.0), TypeError, "bias must be a torch.Tensor, got float"),
    ("bias a head", lambda h, i: dict(bias=nn.Linear(H, V)), TypeError, "bias must be a torch.Tensor, got Linear"),
    ("in fp32", lambda h, i: dict(accumulate_in_fp32="no"), TypeError, "accumulate_in_fp32 must be True or False"),
    ("gather", lambda h, i: dict(gather_head=h["hidden"]), TypeError, "gather_head must be True or False, got Tensor"),
    ("entropy", lambda h, i: dict(return_entropy="no"), TypeError, "return_entropy must be True or False, got str"),
    ("sparse", lambda h, i: dict(weight=h["weight"].to_sparse()), TypeError, "weight must be a dense tensor"),
    ("bias shape", lambda h, i: dict(bias=h["bias"][:3]), ValueError, r"bias must be \(V,\) = \(37,\), got \(3,\)"),
    ("bias dtype", lambda h, i: dict(bias=h["bias"].double()), TypeError, "bias is torch.float64, but hidden is"),
    ("bias elsewhere", lambda h, i: dict(bias=h["bias"].to(META)), ValueError, "bias is on meta but hidden is on cpu"),
    ("module, bias", lambda h, i: dict(weight=nn.Linear(H, V)), ValueError, "bias comes with the head"),
    ("embedding", lambda h, i: dict(weight=nn.Embedding(V, H), bias=None), TypeError, "torch.nn.Linear, got Embedding"),
    ("module width", lambda h, i: dict(weight=nn.Linear(H + 1, V), bias=None), ValueError, r"weight must be \(V, H\)"),
    ("LoRA", lambda h, i: dict(weight=lora(), bias=None), ValueError, "adapter.*target_modules.*merge_and_unload"),
    ("LoRA inside", lambda h, i: dict(weight=lora_in_a_linear(), bias=None), ValueError, "a Linear with an adapter"),
    ("ZeRO-3", lambda h, i: dict(weight=partitioned()), ValueError, "DeepSpeed ZeRO-3.*fused_grpo_loss on its logits"),
    ("ZeRO-3 head", lambda h, i: dict(weight=partitioned_module(), bias=None), ValueError, "ZeRO-3 and empty here"),
    ("chunk 0", lambda h, i: dict(chunk_bytes=0), ValueError, "chunk_bytes must be above 0, got 0"),
    ("chunk float", lambda h, i: dict(chunk_bytes=1e9), TypeError, "chunk_bytes must be an int, got float"),
    ("chunk bool", lambda h, i: dict(chunk_bytes=True), TypeError, "chunk_bytes must be an int, got bool"),
    ("rows negative", lambda h, i: dict(num_rows=-1), ValueError, "num_rows must be 0 or more, got -1.*Leave it out"),
    ("rows float", lambda h, i: dict(num_rows=3.0), TypeError, r"num_rows must be None .* or an int, got float"),
    ("rows too few", lambda h, i: dict(num_rows=3), ValueError, "num_rows=3, but [0-9]+ rows are read.*Leave it out"),
    ("rows too many", lambda h, i: dict(num_rows=B * T + 1), ValueError, "num_rows=31, but"),
    ("logits bf16", lambda h, i: dict(logits_dtype=torch.bfloat16), TypeError, "as hidden is, got.*bfloat16.*cast"),
    ("logits float64", lambda h, i: dict(logits_dtype=torch.float64), TypeError, "torch.float32, or.*got.*float64"),
    ("logits text", lambda h, i: dict(logits_dtype="float32"), TypeError, "logits_dtype must be None or a torch.dtype"),
    ("softcap 0", lambda h, i: dict(softcap=0.0), ValueError, "softcap must be a finite number above 0, got 0"),
    ("softcap inf", lambda h, i: dict(softcap=math.inf), ValueError, "softcap must be a finite number.*got inf"),
    ("softcap text", lambda h, i: dict(softcap="30"), TypeError, "softcap must be a number, got str"),
    ("scale 0", lambda h, i: dict(logit_scale=0), ValueError, "logit_scale must be a finite number above 0, got 0"),
    ("scale nan", lambda h, i: dict(logit_scale=math.nan), ValueError, "logit_scale must be a finite number.*nan"),
    ("scale none", lambda h, i: dict(logit_scale=None), TypeError, "logit_scale must be a number, got NoneType"),
    ("scale tensor", lambda h, i: dict(logit_scale=torch.ones(())), TypeError, "logit_scale must be a number.*Tensor"),
    ("temperature", lambda h, i: dict(temperature=-1.0), ValueError, "temperature must be"),
    ("temperatures", lambda h, i: dict(temperature=torch.ones(3)), ValueError, "temperature must be"),
    ("backend", lambda h, i: dict(backend="cuda"), ValueError, "backend must be"),
    ("unknown keyword", lambda h, i: dict(softcapp=1.0), TypeError, "softcapp"),
]  # fmt: skip

# Of the loss alone.
LOSSES = [
    ("no advantages", lambda h, i: dict(advantages=None), ValueError, "either advantages or rewards"),
    ("old shape", lambda h, i: dict(old_logps=i["old_logps"][:, :3]), ValueError, "old_logps must be"),
    ("old grad", lambda h, i: dict(old_logps=grad(i["old_logps"])), ValueError, "old_logps requires grad.*detach"),
    ("mask shape", lambda h, i: dict(completion_mask=i["completion_mask"][:2]), ValueError, "completion_mask must be"),
    ("mask of 2", lambda h, i: dict(completion_mask=i["completion_mask"].int() * 2), ValueError, "only 0 and 1"),
    ("no reference", lambda h, i: dict(beta=0.1), ValueError, "beta=0.1 needs ref_logps"),
    ("packed alone", lambda h, i: dict(hidden=h["hidden"].flatten(0, 1), completion_ids=i["completion_ids"].flatten()),
     ValueError, "packed input needs cu_seqlens"),
    ("reduction", lambda h, i: dict(reduction="sum"), ValueError, "reduction must be"),
    ("skip with bonus", lambda h, i: dict(skip_zero_advantage=True, entropy_coef=0.1), ValueError, "skip_zero"),
    ("in place", lambda h, i: dict(inplace=True), TypeError, "inplace"),
]  # fmt: skip


def loss(**kwargs):
    return fused_linear_grpo_loss(**kwargs)


def logps(hidden, weight, completion_ids, completion_mask, old_logps, advantages, **kwargs):
    return linear_token_logprobs(hidden, weight, completion_ids, mask=completion_mask, **kwargs)


CALLS = [(loss, *bad) for bad in HEADS + LOSSES] + [(logps, *bad) for bad in HEADS]


@pytest.mark.parametrize(("call", "change", "error", "says"), [(c[0], *c[2:]) for c in CALLS],
                         ids=[f"{c[0].__name__}, {c[1]}" for c in CALLS])  # fmt: skip
@pytest.mark.parametrize("gradient", (False, True))
def test_bad_input(call, change, error, says, gradient):
    head, inputs = batch()
    del inputs["ref_logps"], inputs["importance_weights"]
    for x in head.values():
        x.requires_grad_(gradient)
    with pytest.raises(error, match=f"(?s){says}"):
        call(**{**head, **inputs, **change(head, inputs)})


@pytest.mark.parametrize("setting", ("1GiB", "-5", "1e9"))
def test_chunk_size_of_the_environment(setting, monkeypatch):
    head, inputs = batch()
    monkeypatch.setenv("GRPO_KERNELS_CHUNK_BYTES", setting)
    with pytest.raises(ValueError, match=f"GRPO_KERNELS_CHUNK_BYTES must be a whole number of bytes, got '{setting}'"):
        linear_token_logprobs(**head, completion_ids=inputs["completion_ids"], mask=inputs["completion_mask"])


def test_a_chunk_smaller_than_a_row_is_a_row():
    head, inputs = batch()
    kwargs = dict(completion_ids=inputs["completion_ids"], mask=inputs["completion_mask"])
    want = linear_token_logprobs(**head, **kwargs).logps
    ids, mask = kwargs.values()
    allowed, _ = linear_logprob_bounds(head, ids.clamp(min=0), mask, 1.0, lambda lp, H: lp.sum())
    assert_within(linear_token_logprobs(**head, **kwargs, chunk_bytes=1).logps, want, allowed.logps, "logps", factor=2)


def test_a_head_of_peft():
    """The layer that peft makes of a head, and the head once it is merged."""
    peft = pytest.importorskip("peft", reason="pip install peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(H, V)

    head, inputs = batch(bias=False)
    kwargs = dict(completion_ids=inputs["completion_ids"], mask=inputs["completion_mask"])
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="with an adapter on it"):
        linear_token_logprobs(head["hidden"], model.base_model.model.lm_head, **kwargs)
    merged = model.merge_and_unload()
    assert linear_token_logprobs(head["hidden"], merged.lm_head, **kwargs).logps.shape == (B, T)

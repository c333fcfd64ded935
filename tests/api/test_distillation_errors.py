"""Bad input of distillation: an error of the stated type that names the argument and the remedy."""

import math

import pytest
import torch

from cases import BACKENDS, DEVICE
from distillation_cases import make_pair
from grpo_kernels import TopK, distillation_loss

PAIR = make_pair(V=11, K=3)
FEW = make_pair("rest", V=11, K=3)
IDS, LOGPS = FEW.teacher


def grad(x):
    return x.clone().requires_grad_()


def packed(**changes):
    flat = dict(logits=PAIR.logits.flatten(0, 1), teacher=PAIR.teacher.flatten(0, 1), completion_mask=None,
                cu_seqlens=torch.tensor([0, 5, 12]))  # fmt: skip
    return flat | changes


def changed(x, value, place=(0, 0, 0)):
    x = x.clone()
    x[place] = value
    return x


BAD = {
    "logits no tensor": (dict(logits=[1.0]), TypeError, "logits must be a torch.Tensor"),
    "float64 logits": (dict(logits=PAIR.logits.double()), TypeError, r"logits must be float32.*\.float\(\)"),
    "float64 teacher": (dict(teacher=PAIR.teacher.double()), TypeError, "teacher must be float32"),
    "teacher a tuple": (dict(teacher=(IDS, LOGPS)), TypeError, "teacher must be a torch.Tensor or a TopK"),
    "vocabularies": (dict(teacher=PAIR.teacher[..., :9]), ValueError, "vocabulary of 9, but logits one of 11"),
    "no vocabulary": (dict(logits=PAIR.logits[..., :0]), ValueError, "logits .* without a vocabulary"),
    "strided": (dict(teacher=torch.stack([PAIR.teacher] * 2, -1)[..., 0]), ValueError, "teacher must be contiguous"),
    "logits 4-D": (dict(logits=PAIR.logits[None]), ValueError, r"logits must be \(B, T, V\)"),
    "teacher 2-D": (dict(teacher=PAIR.teacher[0]), ValueError, "both must be packed, or neither"),
    "batches": (dict(teacher=PAIR.teacher[:2]), ValueError, r"each of the 3×4 tokens.*\(2, 4, 11\)"),
    "lengths": (dict(teacher=PAIR.teacher[:, :2], completion_mask=None), ValueError, "each of the 3×2 tokens"),
    "teacher too short": (dict(teacher=PAIR.teacher[:, :3]), ValueError, "each of the 3×4 tokens"),
    "teacher grad": (dict(teacher=grad(PAIR.teacher)), ValueError, r"teacher requires grad.*teacher.detach\(\)"),
    "logps grad": (dict(teacher=TopK(IDS, grad(LOGPS))), ValueError, "teacher.logps requires grad"),
    "float ids": (dict(teacher=TopK(IDS.float(), LOGPS)), TypeError, "teacher.token_ids must be integers"),
    "int logps": (dict(teacher=TopK(IDS, IDS)), TypeError, "teacher.logps must be floating point"),
    "K": (dict(teacher=TopK(IDS, LOGPS[..., :2])), ValueError, r"alike; got \(3, 4, 3\) and \(3, 4, 2\)"),
    "TopK too long": (dict(teacher=TopK(*(torch.cat([x, x], 1) for x in FEW.teacher))), ValueError, "3×4 tokens"),
    "id outside": (dict(teacher=TopK(changed(IDS, 11), LOGPS)), IndexError, r"token_ids\[0, 0, 0\] = 11 .* of 11"),
    "twice": (dict(teacher=TopK(changed(IDS, IDS[0, 0, 2]), LOGPS)), ValueError, r"\[0, 0\] has a token twice"),
    "positive": (dict(teacher=TopK(IDS, changed(LOGPS, 0.5))), ValueError, "teacher.logps must be log-prob"),
    "beta 1.5": (dict(beta=1.5), ValueError, "beta must lie between 0 .* and 1"),
    "beta nan": (dict(beta=math.nan), ValueError, "beta must lie between 0"),
    "beta a tensor": (dict(beta=torch.tensor(0.5)), TypeError, "beta must be a number, got Tensor"),
    "tail": (dict(tail="rest"), ValueError, "tail must be True, False or None, got 'rest'"),
    "reduction": (dict(reduction="sum"), ValueError, "reduction must be 'mean' or 'none'"),
    "mode": (dict(loss_agg_mode="mean"), ValueError, "loss_agg_mode must be one of 'sequence-mean'.*got 'mean'"),
    "mode a list": (dict(loss_agg_mode=["token-mean"]), ValueError, "loss_agg_mode must be one of"),
    "reductions": (dict(reduction=["mean"]), ValueError, r"reduction must be.*got \['mean'\]"),
    "backends": (dict(backend=["torch"]), ValueError, r"backend must be.*got \['torch'\]"),
    "inplace no flag": (dict(inplace="no"), TypeError, "inplace must be True or False, got str"),
    "inplace a tensor": (dict(inplace=PAIR.mask), TypeError, "inplace must be True or False, got Tensor"),
    "sparse mask": (dict(completion_mask=PAIR.mask.int().to_sparse()), TypeError, "completion_mask must be a dense"),
    "sparse logps": (dict(teacher=TopK(IDS, LOGPS.to_sparse())), TypeError, "teacher.logps must be a dense"),
    "mask of another length": (dict(completion_mask=PAIR.mask[:, :2]), ValueError,
                               r"3×2 tokens of completion_mask \(3, 2\)"),
    "mask shape": (dict(completion_mask=PAIR.mask[0]), ValueError, "completion_mask must be"),
    "mask of 2": (dict(completion_mask=PAIR.mask.int() * 2), ValueError, "only 0 and 1"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature must be a finite number above 0"),
    "num_items": (dict(num_items_in_batch=-1), ValueError, "num_items_in_batch must be a finite number"),
    "loss_scale": (dict(loss_scale="1"), TypeError, "loss_scale must be a number"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be None, 'triton' or 'torch'"),
    "bounds of padded": (dict(cu_seqlens=torch.tensor([0, 12])), ValueError, "cu_seqlens goes with packed"),
    "packed alone": (packed(cu_seqlens=None), ValueError, "packed input needs cu_seqlens"),
    "packed bounds": (packed(cu_seqlens=torch.tensor([0, 5, 11])), ValueError, "rise from 0 to N = 12"),
    "packed teacher": (packed(teacher=PAIR.teacher.flatten(0, 1)[:7]), ValueError, "7 packed tokens, but logits 12"),
    "packed constant": (packed(loss_agg_mode="constant"), ValueError, "needs max_completion_length"),
    "keyword": (dict(top_k=3), TypeError, "top_k"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS if DEVICE == "cpu" else ("torch",))  # a GPU's values are not looked at
@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name, backend):
    changes, error, message = BAD[name]
    kwargs = dict(logits=PAIR.logits, teacher=PAIR.teacher, completion_mask=PAIR.mask, backend=backend) | changes
    with pytest.raises(error, match=message):
        distillation_loss(**kwargs)


def test_in_place_on_a_leaf_raises():
    with pytest.raises(ValueError, match="would overwrite a leaf"):
        distillation_loss(grad(PAIR.logits), PAIR.teacher, inplace=True)


def test_masked_rows_of_a_topk_are_not_looked_at():
    ids = IDS.clone()
    ids[~FEW.mask] = 10**9
    assert distillation_loss(FEW.logits, TopK(ids, LOGPS), completion_mask=FEW.mask).loss.isfinite()


def test_logits_given_up_in_place_are_guarded(monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_VALIDATE", "1")
    for reduction in ("mean", "none"):
        x = grad(PAIR.logits) * 1
        loss = distillation_loss(x, PAIR.teacher, inplace=True, reduction=reduction, backend="torch").loss.sum()
        torch.autograd.grad(loss, x)
        with pytest.raises(RuntimeError, match="logits are gone"):
            x.sum()

"""The losses of TRL's other policy trainers, by the keywords of docs/papers.md and docs/trl-and-verl.md.

TRL's own methods run unpatched, on a stub of their trainer, in float64.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from cases import BACKENDS, make_case, ours
from grpo_kernels import LossConfig
from tolerance import assert_within, bounds

pytest.importorskip("trl", reason="parity needs TRL 1.16, which needs Python 3.11")
from trl_oracle import stub_trainer, trl_args

ALL_CLIPPED = {"epsilon": 0.1, "epsilon_high": 0.3}


def case_of(seed=1):
    """Each sequence has a token: TRL's losses of whole sequences count an empty one as -A."""
    case = make_case(B=6, T=5, V=31, seed=seed)
    case.completion_mask[:, 0] = True
    case.completion_ids = torch.where(case.completion_mask, case.completion_ids.clamp(min=0), -100)
    return case


def stub(case, **args):
    """A stub of the trainer, TRL's inputs, and the logits in float64, whose log-probabilities the stub gives."""
    trainer = stub_trainer(trl_args(**args), 1, True, corrected=False)
    x, mask = case.logits.double().requires_grad_(), case.completion_mask
    all_logps = x.log_softmax(-1)
    logps = all_logps.gather(-1, case.completion_ids.clamp(min=0)[..., None])[..., 0]
    entropies = -(all_logps.exp() * all_logps).sum(-1)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropies, None)
    trainer._get_sequence_logps = lambda *_: (logps * mask).sum(1)
    batch = {
        "prompt_ids": case.completion_ids.new_zeros(len(mask), 1), "prompt_mask": mask.new_ones(len(mask), 1),
        "completion_ids": case.completion_ids, "completion_mask": mask.long(), "advantages": case.advantages.double(),
        "old_per_token_logps": case.old_logps.double(), "ref_per_token_logps": case.ref_logps.double(),
        "old_logps": (case.old_logps.double() * mask).sum(1), "ref_logps": (case.ref_logps.double() * mask).sum(1),
    }  # fmt: skip
    return trainer, batch, x


def check(case, loss, x, constant=0.0, names=(), logged=None, **kwargs):
    loss.backward()
    kwargs = {"completion_ids": case.completion_ids, "completion_mask": case.completion_mask, **kwargs}
    allowed = bounds(case.logits, **kwargs)
    for backend in BACKENDS:
        out, grad = ours(case.logits, backend, **kwargs)
        assert_within(out.loss, loss - constant, allowed.loss, "loss")
        assert_within(grad, x.grad, allowed.grad, "gradient")
        for name in names:
            value = torch.tensor(logged[name][-1], dtype=torch.float64)
            assert_within(out.metrics[name], value, allowed.metrics[name], name)


CLIP_RATIOS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/low_min",
               "clip_ratio/high_max")  # fmt: skip


@pytest.mark.parametrize("seed", (1, 2))
def test_rloo(seed):
    from trl.trainer.rloo_trainer import RLOOTrainer

    case = case_of(seed)
    trainer, batch, x = stub(case, **ALL_CLIPPED)
    loss = RLOOTrainer._compute_loss(trainer, None, batch)
    check(case, loss, x, names=CLIP_RATIOS, logged=trainer._metrics["train"], advantages=case.advantages,
          old_logps=case.old_logps, policy_term="clipped", importance_sampling_level="sequence_sum",
          **ALL_CLIPPED)  # fmt: skip


@pytest.mark.parametrize("beta", (0.0, 0.1))
def test_gmpo(beta):
    from trl.experimental.gmpo import GMPOTrainer

    case = case_of()
    trainer, batch, x = stub(case, beta=beta, epsilon=0.2, epsilon_high=0.3)
    loss = GMPOTrainer._compute_loss(trainer, None, batch)
    given = {"ref_logps": case.ref_logps} if beta else {}
    check(case, loss, x, names=CLIP_RATIOS, logged=trainer._metrics["train"], advantages=case.advantages,
          old_logps=case.old_logps, loss_type="gmpo", beta=beta, epsilon=0.2, epsilon_high=0.3, **given)  # fmt: skip


def test_a2po():
    """(β·log ratio to the reference − A)² is 2β times kimi's loss, and what has no gradient: A² and A·ref."""
    from trl.experimental.a2po import A2POTrainer

    case, beta2 = case_of(), 0.05
    trainer, batch, x = stub(case)
    trainer.args = SimpleNamespace(beta2=beta2)
    batch |= {"input_ids": None, "attention_mask": None, "logits_to_keep": None, "v_star": torch.tensor(0.3)}
    batch["rewards"] = batch["advantages"] + batch["v_star"]
    loss = A2POTrainer.compute_loss(trainer, None, batch)
    A, lengths = batch["advantages"], case.completion_mask.sum(1)
    check(case, loss, x, constant=(A.square() + 2 * beta2 * A * batch["ref_logps"]).mean(),
          advantages=case.advantages * lengths, old_logps=case.ref_logps, loss_type="kimi", dro_beta=beta2,
          loss_scale=2 * beta2)  # fmt: skip


def test_iw_opd():
    """The policy gradient: a token's advantage is how far the teacher is above the sampler, early tokens first."""
    from trl.experimental.iw_opd import IWOPDTrainer

    case, gamma, eps = case_of(), 0.7, 1e-8
    x, mask = case.logits.double().requires_grad_(), case.completion_mask
    teacher, rollout = case.ref_logps.double(), case.old_logps.double()
    trainer = SimpleNamespace(temperature=1.0, iw_opd_gamma=gamma, iw_opd_epsilon=eps)
    trainer.model, trainer._metrics = SimpleNamespace(training=True), {"train": defaultdict(list)}
    ids = case.completion_ids.clamp(min=0)
    loss = IWOPDTrainer._compute_iw_opd_loss(trainer, x, ids, ids.masked_fill(~mask, -100), teacher, rollout)
    gap = torch.where(mask, teacher - rollout, 0.0)
    before = gap.abs().cumsum(1) - gap.abs()
    advantages = (1 + gamma * (1 - before / gap.abs().sum(1, keepdim=True))) * gap
    check(case, loss, x, advantages=advantages.float(), loss_type="reinforce")


def test_from_trl_takes_the_arguments_of_no_other_trainer(tmp_path):
    from trl import GRPOConfig, RLOOConfig
    from trl.experimental.gmpo import GMPOConfig

    class Own(GRPOConfig):
        pass

    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "temperature": 1.0}
    assert LossConfig.from_trl(Own(**given)).loss_type == "dapo"
    for other in (GMPOConfig, RLOOConfig):
        with pytest.raises(ValueError, match=f"TRL's {other.__name__}, whose trainer.*docs/trl-and-verl.md"):
            LossConfig.from_trl(other(**given))

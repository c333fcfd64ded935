"""The trainer's two ways to the loss, through logits and from hidden states: the same run, chosen as stated."""

import dataclasses
import io
import itertools
import json

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    RecurrentGemmaConfig,
)

from grpo_kernels.integrations import head
from grpo_kernels.integrations.head import ModelHead
from grpo_kernels.trainer import __main__ as entry
from grpo_kernels.trainer import cli, data, scoring
from grpo_kernels.trainer import teacher as distilling
from grpo_kernels.trainer.head import find_head
from grpo_kernels.trainer.model import tiny_qwen2
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.task import addition
from grpo_kernels.trainer.tokenizer import character_tokenizer
from model_tolerance import assert_same_run, nudged_policies, nudged_run
from tolerance import U

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = addition()
TIMES = {"step_time", "sampling_time", "reward_time", "loss_time", "optimizer_time"}
SMALL = {"steps": 3, "batch_size": 4, "num_generations": 4, "eval_every": 3, "warmup_steps": 0}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def run(tmp_path, monkeypatch, **options):
    """(rows of metrics.jsonl without times, which losses were called, what was printed)"""
    called = set()
    for name in ("fused_grpo_loss", "token_logprobs", "fused_linear_grpo_loss", "linear_token_logprobs"):
        real = getattr(scoring, name)
        monkeypatch.setattr(scoring, name, lambda *a, real=real, name=name, **k: (called.add(name), real(*a, **k))[1])

    def starts_even(prompts, completions, **columns):  # an untrained policy earns it now and then
        return [float(text[:1] in set("02468")) for text in completions]

    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time
    monkeypatch.setitem(data.BUILT_IN, "addition", lambda: dataclasses.replace(TASK, reward=starts_even))
    console = Console(file=io.StringIO(), width=80)
    result = cli.run(Options(output_dir=str(tmp_path), **{**SMALL, **options}), console)
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    monkeypatch.undo()
    return rows, called, console.file.getvalue()


LOGITS, LINEAR = {"fused_grpo_loss", "token_logprobs"}, {"fused_linear_grpo_loss", "linear_token_logprobs"}


@pytest.mark.parametrize("options", [{}, {"loss_type": "dapo", "epsilon_high": 0.28}, {"dtype": "bfloat16"}], ids=str)
def test_both_ways_are_the_same_run(options, tmp_path, monkeypatch):
    a, called_a, said_a = run(tmp_path / "a", monkeypatch, loss_path="logits", **options)
    b, called_b, said_b = run(tmp_path / "b", monkeypatch, loss_path="linear", **options)
    assert called_a == LOGITS and called_b == LINEAR
    assert "loss from logits" in said_a and "loss from hidden states" in said_b
    assert len(a) == len(b) and sum("loss" in row for row in a) == 3

    def make(seed):
        with nudged_policies(seed, 2**-8 if options.get("dtype") else U):
            return run(tmp_path / f"off {seed}", monkeypatch, loss_path="logits", **options)[0], {}

    assert_same_run((b, {}), (a, {}), nudged_run((a, {}), make))
    assert max(row["grad_norm"] for row in a if "loss" in row) > 0


@pytest.mark.parametrize("teacher", (False, True))
def test_fp32_logits_of_bf16_hidden_states(teacher, tmp_path, monkeypatch):
    """All losses and log-probabilities of a run are asked for them, and get bf16."""
    asked = []
    names = ("fused_linear_grpo_loss", "linear_token_logprobs")
    for module, name in [(scoring, name) for name in names] + [(distilling, "fused_linear_distillation_loss")]:
        real = getattr(module, name)

        def noted(*args, real=real, name=name, **kwargs):
            asked.append((name, kwargs["hidden"].dtype, kwargs["weight"].dtype, kwargs["logits_dtype"]))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)
    options = {**SMALL, "steps": 1, "loss_path": "linear", "dtype": "bfloat16"}
    if teacher:
        tokenizer = character_tokenizer(TASK.alphabet)
        tiny_qwen2(tokenizer, 64).save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
        options["teacher"] = str(tmp_path / "teacher")
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)
    wants = (("fused_linear_distillation_loss",) if teacher else names, (("hidden", None), ("float32", torch.float32)))
    for (name, dtype), wanted in itertools.product(wants[1], [wants[0]]):
        asked.clear()
        cli.run(Options(output_dir=str(tmp_path / name), logits_dtype=name, **options), Console(file=io.StringIO()))
        assert {each[0] for each in asked} == set(wanted)
        assert {each[1:] for each in asked} == {(torch.bfloat16, torch.bfloat16, dtype)}


@pytest.mark.parametrize(("budget", "want"), [(4.0, LOGITS), (1e-6, LINEAR)])
def test_auto_is_by_the_budget(budget, want, tmp_path, monkeypatch):
    _, called, _ = run(tmp_path, monkeypatch, logits_budget_gib=budget, steps=1, beta=0.0, num_iterations=1)
    assert called == {name for name in want if "loss" in name}  # one update, no beta: nobody asks for log-probs


def test_the_budget_is_of_logits_and_gradient():
    """64 × 8 completions of 4 + 1 positions, 2**20 words, twice: 20 GiB in fp32."""
    for dtype, gib in (("float32", 20.0), ("bfloat16", 10.0)):
        fits, not_quite = (Options(dtype=dtype, logits_budget_gib=x) for x in (gib, gib - 1e-6))
        assert not fits.takes_hidden_states(4, 2**20) and not_quite.takes_hidden_states(4, 2**20)
    assert Options(loss_path="linear").takes_hidden_states(1, 2)
    assert not Options(loss_path="logits", logits_budget_gib=1e-9).takes_hidden_states(4, 2**20)


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LlamaConfig(**SIZES), ModelHead()),
        (PhiConfig(**SIZES), ModelHead()),  # a bias
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2), ModelHead()),
        (CohereConfig(**SIZES, logit_scale=0.25), ModelHead(0.25)),
        (GraniteConfig(**SIZES, logits_scaling=4.0), ModelHead(0.25)),
        (HyperCLOVAXConfig(**SIZES, logits_scaling=4.0), ModelHead(4.0)),
        (Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.5), ModelHead(1.0, 0.5)),
        (RecurrentGemmaConfig(**SIZES, lru_width=32, block_types=["attention"], logits_soft_cap=3.0),
         ModelHead(1.0, 3.0)),
        (FalconH1Config(**SIZES, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                        mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8), ModelHead(0.5)),
        (FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2), ModelHead()),
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4), ModelHead()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_heads_of_transformers(config, wanted):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    assert find_head(model) == wanted and model.training


def test_a_multiplier_of_the_output(policy):
    """As Muse's configs name their scale."""
    policy.config.output_multiplier = 0.2
    with_another_scale(policy, 0.2)
    assert find_head(policy) == ModelHead(0.2)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return tiny_qwen2(character_tokenizer(TASK.alphabet), TASK.max_completion_length)


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 3.0 * super().forward(x)


def with_another_scale(policy, scale=1.1):
    forward = policy.forward

    def scaled(**kwargs):
        out = forward(**kwargs)
        out.logits = out.logits * scale
        return out

    policy.forward = scaled


def with_another_head(policy):
    policy.lm_head = Scaled(64, policy.config.vocab_size, bias=False)


def with_an_adapter(policy):
    """LoRA as it starts, with B = 0: the logits are still those of the plain head."""
    policy.lm_head.lora_A = torch.nn.ModuleDict()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_another_scale, r"Head\(logit_scale=1.0, softcap=None\) is off by 0.09.* of the model's largest logit"),
        (lambda policy: with_another_scale(policy, 1.003), "is off by 0.003"),  # fp32 is told from bf16
        (with_an_adapter, "the output embedding is a Linear with an adapter on it"),
        (with_another_head, "the output embedding is a Scaled, not a torch.nn.Linear"),
        (lambda policy: setattr(policy, "base_model_prefix", "nothing"), "no body"),
    ],
)
def test_a_head_that_is_not_understood(policy, change, says):
    change(policy)
    with pytest.raises(OptionError, match=f"head of Qwen2ForCausalLM is not understood: .*{says}.*--loss-path logits"):
        find_head(policy)


def test_such_a_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(head, "TOLERANCE", -1.0)
    arguments = ["--loss-path", "linear", "--warmup-steps", "0", "--steps", "1", "--output-dir", str(tmp_path)]
    assert entry.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --loss-path linear: ") and message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [({"loss_path": "chunks"}, "--loss-path must be one of auto, logits, linear"),
     ({"logits_dtype": "bfloat16"}, "--logits-dtype must be one of hidden, float32, got bfloat16"),
     ({"logits_dtype": "float32"}, "--logits-dtype float32 is for a loss that makes the logits. Set"),
     ({"logits_budget_gib": 0.0}, "--logits-budget-gib must be a finite number above 0, got 0.0")],
)  # fmt: skip
def test_bad_options(options, says):
    with pytest.raises(OptionError, match=says):
        Options(**options)

"""Models, data sets and tasks of the trainer, from tiny files that the tests write."""

import json
import re
import types

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's requirements are not installed: pip install '.[trainer]'")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from grpo_kernels.trainer import __main__ as entry
from grpo_kernels.trainer import cli, data, warmup
from grpo_kernels.trainer.model import load_config, load_model, load_tokenizer
from grpo_kernels.trainer.options import OptionError, Options
from grpo_kernels.trainer.task import columns_of, countdown, reaches_target, value_of
from grpo_kernels.trainer.tokenizer import character_tokenizer
from trainer_cases import TASK, run, saved_model

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = "abcdefghijklmnopqrstuvwxyzSDU0123456789+=|:# "
TEMPLATE = ("{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}"
            "{% if add_generation_prompt %}a:{% endif %}")  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cli, "save_curves", lambda *_: None)  # what takes the time


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


SUMS = [{"question": f"{a}+{b}=", "answer": str(a + b), "level": a} for a in range(5) for b in range(4)]
FIELDS = {"prompt_field": "question", "max_completion_length": 4}


# --- models ---------------------------------------------------------------------------------------


def test_any_model_and_a_file(tmp_path):
    model = saved_model(tmp_path / "model")
    result, rows, said = run(tmp_path / "run", model=model, dataset=jsonl(tmp_path / "sums.jsonl", SUMS), **FIELDS,
                             learning_rate=1e-2, reward=("target_length=1", "trainer_cases:starts_even"))  # fmt: skip
    assert "18 problems to learn from, 2 held out" in said and "model, " in said
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model, result.model))
    assert type(after) is type(before)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_the_tiny_model_learns_a_file_too(tmp_path):
    """Without --model the vocabulary is the file's characters, and the warm-up learns its answers."""
    dataset = jsonl(tmp_path / "sums.jsonl", SUMS)
    _, _, said = run(tmp_path / "run", dataset=dataset, **FIELDS, warmup_steps=3, steps=1)
    assert "warm-up: 3 supervised steps" in said


def test_dropout_is_off_and_sampling_is_the_options(tmp_path):
    tokenizer = character_tokenizer(TASK.alphabet)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=None,
                        eos_token_id=1, pad_token_id=0, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)  # fmt: skip
    source = GPT2LMHeadModel(config)
    source.generation_config.update(do_sample=True, repetition_penalty=1.3, top_k=20)
    source.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = Options(model=str(tmp_path))
    config, tokenizer = load_config(options), load_tokenizer(options)
    model = load_model(options, tokenizer, config).train()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert model.generation_config.repetition_penalty in (None, 1.0) and model.generation_config.top_k is None
    assert model.dtype == torch.float32 and options.learning_rate == 1e-6 and options.warmup_steps == 0


def test_warm_up_of_a_model_whose_tokens_are_not_characters(tmp_path):
    """The boundary of prompt and answer is one of tokens."""
    tokenizer = character_tokenizer(TASK.alphabet)
    torch.manual_seed(0)
    saved_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    loss = warmup.answer_loss(model, tokenizer, [TASK.train[0], TASK.train[-1]])
    loss.backward()
    assert loss > 0 and model.lm_head.weight.grad.abs().max() > 0


# --- chat templates -------------------------------------------------------------------------------


@pytest.fixture
def chatty():
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


MESSAGES = [{"role": "user", "content": "1+1"}]


@pytest.mark.parametrize(
    ("prompt", "options", "text", "templated"),
    [
        ("1+1", {}, "u:1+1|a:", True),
        ("1+1", {"system_prompt": "add"}, "s:add|u:1+1|a:", True),
        ("1+1", {"chat_template": "messages"}, "1+1", False),
        ("1+1", {"chat_template": "off"}, "1+1", False),
        (MESSAGES, {}, "u:1+1|a:", True),
        (MESSAGES, {"chat_template": "messages"}, "u:1+1|a:", True),
    ],
    ids=str,
)
def test_chat_template(chatty, prompt, options, text, templated):
    records = [{"prompt": prompt, "answer": 2, "level": 1}] * 2
    problems, applied = data.problems_of(records, chatty, Options(**options), "--dataset x")
    assert problems[0].prompt == text and applied is templated
    assert problems[0].answer == "2" and problems[0].columns == (("level", 1),)
    plain, applied = data.problems_of([{"prompt": "1+1", "answer": ""}], character_tokenizer("1+"), Options(), "x")
    assert plain[0].prompt == "1+1" and not applied


def test_a_run_with_a_chat_template(tmp_path, chatty):
    model = saved_model(tmp_path / "model", tokenizer=chatty)
    dataset = jsonl(tmp_path / "chat.jsonl", [{"prompt": MESSAGES, "answer": "2"}] * 4)
    _, rows, said = run(tmp_path / "run", model=model, dataset=dataset, max_completion_length=3, steps=1,
                        reward=("keyword_coherence", "target_length=1"))  # fmt: skip
    assert "u:1+1|a:" in said and rows[-1]["step"] == 1


# --- built-in tasks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("3*5+7", 22), ("(1+2)*3", 9), ("1-2-3", -4), ("2**3", None), ("-1+2", None), ("1+", None), ("", None),
     ("1/2", None), ("007", None), ("1+x", None), ("(((", None), ("12+3", 15)],
)  # fmt: skip
def test_expressions(text, value):
    worked_out = value_of(text)
    assert (worked_out and worked_out[0]) == value


def test_countdown_takes_every_right_answer_and_no_other():
    prompts = ["3,5,7>22:"] * 7
    completions = ["3*5+7", "7+5*3", "22", "3*5+5", "3*5+7+0", "15+7", "3*5+7<pad>"]
    assert reaches_target(prompts, completions) == [1.0, 1.0, 0, 0, 0, 0, 0]


def test_countdown_problems_are_solved_by_their_answers():
    task = countdown()
    problems = task.train[::101] + task.held_out
    assert set(reaches_target([p.prompt for p in problems], [p.answer for p in problems])) == {1.0}
    assert all(len(p.answer) < task.max_completion_length for p in problems)
    assert {c for p in problems for c in p.prompt + p.answer} <= set(task.alphabet)

    def same(problem):  # whatever the order of the numbers
        numbers, target = problem.prompt.rstrip(":").split(">")
        return tuple(sorted(numbers.split(","))), target

    assert not {same(p) for p in task.train} & {same(p) for p in task.held_out}
    assert len(task.held_out) == 250 and len(task.train) > 4000


def test_countdown_with_a_chat_template(tmp_path, chatty):
    """Its reward reads the problem, not what the template has around it."""
    chatty = character_tokenizer(LETTERS + "*-(),>")
    chatty.chat_template = TEMPLATE
    options = Options(task="countdown", model="m", system_prompt="3,5,7")
    task = data.task_of(options, chatty)
    chosen = task.train[::97]
    assert all(each.prompt.startswith("s:3,5,7|u:") and each.prompt.endswith(":|a:") for each in chosen)
    columns = columns_of(chosen)
    assert set(reaches_target([p.prompt for p in chosen], [p.answer for p in chosen], **columns)) == {1.0}
    model = saved_model(tmp_path / "model", tokenizer=chatty)
    _, rows, _ = run(tmp_path / "run", model=model, task="countdown", steps=1)
    assert rows[1]["rewards/reaches_target/mean"] == 0.0


def test_a_run_of_countdown(tmp_path):
    _, rows, said = run(tmp_path, task="countdown", warmup_steps=2, steps=1)
    assert "GRPO on countdown" in said and "rewards/reaches_target/mean" in rows[1]


def test_line_ends_inside_of_a_text(tmp_path):
    """JSON does not escape U+2028 and others, at which str.splitlines breaks; and editors may put a mark in front."""
    records = [{"prompt": f"a{mark}b", "answer": "c"} for mark in "\u2028\u2029\x85"]
    for ends in ("\n", "\r\n"):
        text = "".join(json.dumps(record, ensure_ascii=False) + ends for record in records)
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / "x.jsonl").write_bytes(text.encode(encoding))
            assert data.read(str(tmp_path / "x.jsonl"), "dataset", Options()) == records


# --- bad input ------------------------------------------------------------------------------------


def test_hub_names_go_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"prompt": "1", "answer": "2"}]

    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for spec in ("org/name", "org/name:main", "org/name:main:test"):
        assert data.read(spec, "dataset", Options()) == [{"prompt": "1", "answer": "2"}]
    assert asked == [("org/name", None, "train"), ("org/name", "main", "train"), ("org/name", "main", "test")]

    def fails(*_, **__):
        raise ConnectionError("no network.\nand more")

    monkeypatch.setattr(__import__("sys").modules["datasets"], "load_dataset", fails)
    with pytest.raises(OptionError, match=r"--dataset org/name .* hub name: no network\. Give a JSONL file"):
        data.read("org/name", "dataset", Options())
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"--dataset org/name .* -m pip install datasets"):
        data.read("org/name", "dataset", Options())


@pytest.fixture
def files(tmp_path, chatty):
    """Good and bad files by name."""
    saved_model(tmp_path / "model", LETTERS)
    saved_model(tmp_path / "chatty", tokenizer=chatty)
    unpadded = character_tokenizer(TASK.alphabet)
    unpadded.save_pretrained(tmp_path / "unpadded")
    saved_model(tmp_path / "unpadded")
    path = tmp_path / "unpadded" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    jsonl(tmp_path / "good.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(9)])
    jsonl(tmp_path / "one.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    jsonl(tmp_path / "long.jsonl", [{"prompt": "1+1=" * n, "answer": "2"} for n in (1, 2, 15)])
    jsonl(tmp_path / "chat.jsonl", [{"prompt": MESSAGES, "answer": "2"}] * 3)
    jsonl(tmp_path / "mixed.jsonl", [{"prompt": MESSAGES, "answer": "2"}, {"prompt": "1", "answer": "2"}] * 3)
    jsonl(tmp_path / "numbers.jsonl", [{"prompt": 3, "answer": "2"}] * 3)
    jsonl(tmp_path / "open.jsonl", [{"prompt": "1"}] * 3)
    jsonl(tmp_path / "blank.jsonl", [{"prompt": "" if i % 2 else "1", "answer": "2"} for i in range(6)])
    jsonl(tmp_path / "silent.jsonl", [{"prompt": [], "answer": "2"}] * 3)
    for name in ("prompts", "completions"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "1", "answer": "2", name: "3"}] * 3)
    strict = character_tokenizer(LETTERS)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict.chat_template = refusal + TEMPLATE
    saved_model(tmp_path / "strict", tokenizer=strict)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1", "answer": "2"}\n{"prompt": \n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "notes").mkdir()
    pickled = tmp_path / "pickled"
    saved_model(pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--dataset missing.jsonl", ["--dataset missing.jsonl is not readable", "No such file"]),
        ("--dataset notes", ["--dataset notes is not readable", "directory", "JSONL"]),
        ("--dataset empty.jsonl", ["--dataset empty.jsonl is empty"]),
        ("--dataset broken.jsonl", ["--dataset broken.jsonl, line 2: no JSON", "one object on each line"]),
        ("--dataset list.jsonl", ["--dataset list.jsonl, line 1: a list"]),
        ("--dataset good.jsonl --prompt-field question", ["no field 'question'", "--prompt-field", "'prompt'"]),
        ("--dataset good.jsonl --answer-field solution", ["no field 'solution'", "--answer-field"]),
        ("--dataset good.jsonl --eval-dataset missing.jsonl", ["--eval-dataset missing.jsonl is not readable"]),
        ("--dataset one.jsonl", ["has 1 problems, and 1 are to be held out", "--held-out", "--eval-dataset"]),
        ("--dataset numbers.jsonl", ["record 1: the prompt is a int", "--prompt-field"]),
        ("--dataset chat.jsonl", ["record 1", "chat template", "the tokenizer has none"]),
        ("--dataset chat.jsonl --model chatty --chat-template off", ["--chat-template off forbids that"]),
        ("--dataset mixed.jsonl --model chatty --chat-template messages", ["Set --chat-template auto"]),
        ("--dataset open.jsonl --reward target_length=2", ["--warmup-steps 600 learns from answers"]),
        ("--dataset long.jsonl --model model --max-completion-length 8",
         ["--dataset: the prompt '1+1=", "60 tokens", "context of 64", "--max-completion-length",
          "--max-prompt-length"]),
        ("--dataset long.jsonl --model model --max-prompt-length 2", ["--max-prompt-length 2 leaves no", "4 tokens"]),
        ("--model model --max-completion-length 60", ["--task: the prompt", "context of 64"]),
        ("--model unpadded", ["--model unpadded has no pad token", "--pad-token '<eos>'"]),
        ("--model model --pad-token <nothing>", ["--pad-token <nothing> is not in the vocabulary"]),
        ("--model notes", ["--model notes could not be loaded", "config.json"]),
        ("--model pickled", ["--model pickled could not be loaded", "weights in safetensors"]),
        ("--dataset blank.jsonl --model model --held-out 2", ["--dataset has", "problems whose prompt has no token"]),
        ("--dataset prompts.jsonl --model model", ["--dataset prompts.jsonl has a field 'prompts'", "Rename"]),
        ("--dataset completions.jsonl --model model", ["has a field 'completions'", "Rename"]),
        ("--dataset silent.jsonl --model chatty", ["silent.jsonl, record 1: the chat template refuses", "empty"]),
        ("--dataset good.jsonl --model strict --system-prompt x", ["refuses the prompt: no system", "--system-prompt"]),
        ("--task addition --model strict --system-prompt x", ["--task addition: the chat template refuses"]),
        ("--dataset good.jsonl --model model --system-prompt x", ["--system-prompt is a message", "template"]),
        ("--model chatty --chat-template off --system-prompt x", ["--system-prompt is a message"]),
        ("--eval-dataset good.jsonl", ["--eval-dataset is for --dataset"]),
        ("--held-out 3", ["--held-out is for --dataset"]),
        ("--answer-field x", ["--answer-field is for --dataset"]),
        ("--pad-token x", ["--pad-token is for --model"]),
        ("--teacher-beta 0.5", ["--teacher-beta is for --teacher"]),
        ("--device meta", ["--device meta is not usable"]),
        ("--task subtraction", ["--task", "subtraction"]),
        ("--batch-size 3 --num-generations 5 --num-minibatches 2", ["--num-minibatches", "15 completions"]),
        ("--backend triton --device cpu", ["--backend triton", "--backend torch"]),
        ("--backend reference --loss-path linear", ["--backend reference takes logits"]),
        ("--resume", ["--resume: there is no checkpoint", "start anew"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_written(argv, words, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "triton" in argv:
        from grpo_kernels.call import ops

        def unavailable(*_):
            raise ValueError("compiled kernels cannot run on CPU tensors.")

        monkeypatch.setattr(ops, "choose_backend", unavailable)
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        raise SystemExit(entry.main(argv.split()))
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in words), message
    assert sorted(files.rglob("*")) == before


def test_long_prompts_are_left_out_and_counted(files):
    dataset = jsonl(files / "some.jsonl", [{"prompt": "1+1=" * (1 + i % 3), "answer": "2"} for i in range(12)])
    _, _, said = run(files / "run", dataset=dataset, max_prompt_length=8, held_out=6, max_completion_length=4, steps=1)
    counts = [int(n) for n in re.findall(r"(\d+) problems to learn from, (\d+) held out", said)[0]]
    assert sum(counts) == 8 and "4 left out: their prompts have more than 8 tokens" in said


def test_a_pad_token_can_be_named(files):
    tokenizer = load_tokenizer(Options(model=str(files / "unpadded"), pad_token="<eos>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1 and tokenizer.padding_side == "left"

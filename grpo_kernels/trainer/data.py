"""Problems from a JSONL file or the hub, with chat templates, checked before a run writes anything."""

import dataclasses
import importlib.util
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from grpo_kernels.trainer.options import OptionError, Options, flag
from grpo_kernels.trainer.rewards import chosen, exact_answer
from grpo_kernels.trainer.task import Problem, Task, addition, countdown

COMPLETION_LENGTH = 256  # unless the options say
MOST_HELD_OUT = 200
_SPLIT_SEED = 20240205  # not the run's: every run is measured on the same problems

Record = dict[str, object]


def read_jsonl(path: Path, name: str) -> list[Record]:
    """The objects of a file with one on each line; ``name``: of the option, for errors.

    Raises:
        OptionError: the file is not readable, or a line is no JSON object.
    """
    try:
        # Not splitlines: a text may hold U+2028 and others of its line ends, which JSON does not escape.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"not UTF-8: {error}"
        raise OptionError(f"{flag(name)} {path} is not readable: {reason}. Give a JSONL file.") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise OptionError(
                f"{flag(name)} {path}, line {number}: no JSON ({error.msg}). Write one object on each line."
            ) from None
        if not isinstance(record, dict):
            raise OptionError(
                f"{flag(name)} {path}, line {number}: a {type(record).__name__}, not an object. Write one object "
                "with its fields on each line."
            )
        records.append(record)
    return records


def read_hub(spec: str, name: str) -> list[Record]:
    """The rows of a data set of the hub, NAME, NAME:CONFIG or NAME:CONFIG:SPLIT.

    Raises:
        OptionError: the package ``datasets`` is missing, or it does not find the data set.
    """
    if importlib.util.find_spec("datasets") is None:
        raise OptionError(
            f"{flag(name)} {spec} is no file here, and hub names need the package datasets. Install it with "
            f"{sys.executable} -m pip install datasets, or give a JSONL file."
        )
    import datasets

    where, config, split = (*spec.split(":"), "", "")[:3]
    try:
        return list(datasets.load_dataset(where, config or None, split=split or "train"))
    except Exception as error:  # of many kinds: the network, the hub, the format
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OptionError(
            f"{flag(name)} {spec} is no file here, and could not be loaded as a hub name: {reason}. Give a JSONL "
            "file, or NAME:CONFIG:SPLIT."
        ) from error


def read(spec: str, name: str, options: Options) -> list[Record]:
    """The records of a data set; each has a prompt and an answer.

    Raises:
        OptionError: there is no such data set, it is empty, or a record lacks a field.
    """
    path = Path(spec)
    is_file = path.exists() or path.suffix in (".json", ".jsonl", ".txt")
    records = read_jsonl(path, name) if is_file else read_hub(spec, name)
    if not records:
        raise OptionError(f"{flag(name)} {spec} is empty. Give one with at least one problem.")
    for i, record in enumerate(records):
        for option in ("prompt_field", "answer_field"):
            field = getattr(options, option)
            if field not in record and (option == "prompt_field" or not options.reward):
                raise OptionError(
                    f"{flag(name)} {spec}, record {i + 1}, has no field {field!r}. Name the field with "
                    f"{flag(option)}; there are {', '.join(map(repr, record))}."
                )
    return records


def is_templated(prompt: object, tokenizer: PreTrainedTokenizerBase | None, options: Options, where: str) -> bool:
    """Whether the chat template is applied to a prompt.

    Raises:
        OptionError: the prompt is neither text nor messages, or has messages and there is no template.
    """
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    if isinstance(prompt, str):
        return has_template and options.chat_template == "auto"
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
        raise OptionError(
            f"{where}: the prompt is a {type(prompt).__name__}. It must be a text, or a list of messages "
            "{'role': ..., 'content': ...}; --prompt-field names its field."
        )
    if options.chat_template == "off" or not has_template:
        why = "--chat-template off forbids that" if options.chat_template == "off" else "the tokenizer has none"
        raise OptionError(
            f"{where}: the prompt is a list of messages, which takes a chat template, and {why}. Use prompts that are "
            "plain text, or a --model with a template."
        )
    return True


def with_template(prompt: object, tokenizer: PreTrainedTokenizerBase, options: Options, where: str) -> str:
    """The prompt as the chat template writes it.

    Raises:
        OptionError: the template refuses it.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if options.system_prompt is not None:
        messages = [{"role": "system", "content": options.system_prompt}, *messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template's own code: some take no system message, say
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OptionError(
            f"{where}: the chat template refuses the prompt: {reason}. Change the prompt, leave --system-prompt out, "
            "or set --chat-template off for prompts that are texts."
        ) from error


def problems_of(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase | None, options: Options, where: str
) -> tuple[list[Problem], bool]:
    """(problems, whether their prompts have the chat template applied)

    Raises:
        OptionError: as of `is_templated` and `with_template`; some prompts would have the template, and others not; or
            a field has a name under which rewards get something else.
    """
    names = list(dict.fromkeys(name for record in records for name in record if name != options.prompt_field))
    for name in names:
        if name in ("prompts", "completions"):
            raise OptionError(
                f"{where} has a field {name!r}, and rewards get the {name} under that name. Rename the field."
            )
    prompts = [record[options.prompt_field] for record in records]
    kinds = [is_templated(x, tokenizer, options, f"{where}, record {i}") for i, x in enumerate(prompts, 1)]
    if len(set(kinds)) > 1:
        raise OptionError(f"{where} has prompts that are texts and others that are messages. Set --chat-template auto.")
    made = []
    for i, (prompt, record) in enumerate(zip(prompts, records), 1):
        text = with_template(prompt, tokenizer, options, f"{where}, record {i}") if kinds[0] else prompt
        answer = record.get(options.answer_field)
        # A field that some records lack is None there.
        columns = tuple((name, record.get(name)) for name in names if name != "answer")
        made.append(Problem(text, "" if answer is None else str(answer), columns))
    return made, kinds[0]


def from_dataset(options: Options, tokenizer: PreTrainedTokenizerBase | None) -> Task:
    """The task that --dataset is; rewarded by exact answer unless --reward says otherwise.

    Raises:
        OptionError: as of `read` and `problems_of`; or nothing is left to train on.
    """
    where = f"--dataset {options.dataset}"
    train, templated = problems_of(read(options.dataset, "dataset", options), tokenizer, options, where)
    if options.eval_dataset is not None:
        records = read(options.eval_dataset, "eval_dataset", options)
        held_out, also = problems_of(records, tokenizer, options, f"--eval-dataset {options.eval_dataset}")
        held_out = held_out[: options.held_out]
        if also != templated:
            raise OptionError("--eval-dataset has texts where --dataset has messages. Set --chat-template auto.")
    else:
        count = options.held_out or min(MOST_HELD_OUT, max(1, len(train) // 10))
        if count >= len(train):
            raise OptionError(
                f"{where} has {len(train)} problems, and {count} are to be held out. Lower --held-out, give more "
                "problems, or name others with --eval-dataset."
            )
        random.Random(_SPLIT_SEED).shuffle(train)
        held_out, train = train[:count], train[count:]
    rewards = chosen(options)
    has_answers = any(each.answer for each in train)
    return Task(
        name=Path(options.dataset).name,
        note="from --dataset",
        alphabet="".join(sorted({c for each in (*train, *held_out) for c in each.prompt + each.answer})),
        train=tuple(train),
        held_out=tuple(held_out),
        max_completion_length=options.max_completion_length or COMPLETION_LENGTH,
        reward=exact_answer if has_answers or not rewards else rewards[0].function,
        rewards=rewards,
        templated=templated,
    )


BUILT_IN = {"addition": addition, "countdown": countdown}


def task_of(options: Options, tokenizer: PreTrainedTokenizerBase | None) -> Task:
    """What the options say to train on; ``tokenizer``: of --model.

    Raises:
        OptionError: the data set, a reward or a template is not usable.
    """
    if options.dataset is not None:
        task = from_dataset(options, tokenizer)
    else:
        task = BUILT_IN[options.task]()
        length = options.max_completion_length or task.max_completion_length
        task = dataclasses.replace(task, rewards=chosen(options), max_completion_length=length)
        if tokenizer is not None and is_templated("", tokenizer, options, ""):
            task = dataclasses.replace(
                task, train=tuple(_templated(each, tokenizer, options) for each in task.train),
                held_out=tuple(_templated(each, tokenizer, options) for each in task.held_out), templated=True,
            )  # fmt: skip
    if options.system_prompt is not None and not task.templated:
        raise OptionError(
            "--system-prompt is a message, which takes a chat template, and none is applied. Leave it out, write it "
            "into the prompts, or take a --model with a template."
        )
    if options.warmup_steps and not all(each.answer for each in task.train):
        raise OptionError(
            f"--warmup-steps {options.warmup_steps} learns from answers, and --dataset has prompts without. Set "
            "--warmup-steps 0, or name the field with --answer-field."
        )
    if "target_length" in options.reward and "target_length" not in dict(task.train[0].columns):
        raise OptionError(
            "--reward target_length finds no field 'target_length' in the data. Say how many words, e.g. "
            "--reward target_length=80."
        )
    return task


def _templated(problem: Problem, tokenizer: PreTrainedTokenizerBase, options: Options) -> Problem:
    """With the chat template; its reward still reads the problem itself."""
    prompt = with_template(problem.prompt, tokenizer, options, f"--task {options.task}")
    return problem._replace(prompt=prompt, columns=(*problem.columns, ("problem", problem.prompt)))


def fitted(task: Task, tokenizer: PreTrainedTokenizerBase, context: int | None, options: Options) -> tuple[Task, int]:
    """(the task without prompts beyond --max-prompt-length, how many were left out)

    Raises:
        OptionError: a prompt has no token, or exceeds the model's context with the longest completion; or no prompt is
            left.
    """
    source = "--task" if options.dataset is None else "--dataset"
    kept: dict[str, tuple[Problem, ...]] = {}
    for part in ("train", "held_out"):
        problems = getattr(task, part)
        ids = tokenizer([each.prompt for each in problems], add_special_tokens=not task.templated)["input_ids"]
        lengths = [len(each) for each in ids]
        if 0 in lengths:
            raise OptionError(
                f"{source} has {lengths.count(0)} {part.replace('_', '-')} problems whose prompt has no token. Give "
                "each prompt some text, or leave these problems out."
            )
        most = options.max_prompt_length
        kept[part] = tuple(each for each, n in zip(problems, lengths) if most is None or n <= most)
        if not kept[part]:
            raise OptionError(
                f"--max-prompt-length {most} leaves no {part.replace('_', '-')} problem; the shortest prompt has "
                f"{min(lengths)} tokens. Raise it."
            )
        longest = max(n for n in lengths if most is None or n <= most)
        if context is not None and longest + task.max_completion_length > context:
            text = problems[lengths.index(longest)].prompt
            raise OptionError(
                f"{source}: the prompt {text[:40]!r} has {longest} tokens, and with {task.max_completion_length} of a "
                f"completion that is beyond the model's context of {context}. Lower --max-completion-length, leave out "
                "long prompts with --max-prompt-length, or take another --model."
            )
    left_out = len(task.train) + len(task.held_out) - len(kept["train"]) - len(kept["held_out"])
    return dataclasses.replace(task, **kept), left_out

"""GRPO_KERNELS_ROWS: which way the rows of a loss take, and why."""

import csv

import pytest
import torch

from benchmarks import kernels
from cases import make_case, ours
from grpo_kernels.objective.batch import Batch
from grpo_kernels.triton_backend import onchip_record, ways
from pretend_gpu import pretended

BF16, FP32 = torch.bfloat16, torch.float32
without_gpu = pytest.mark.skipif(torch.cuda.is_available() or pretended(), reason="about calls that no GPU sees")


def obstacle(logits, out=None, **numbers):
    ids = torch.zeros(logits.shape[:2], dtype=torch.int64)
    return ways.obstacle(logits, logits if out is None else out, Batch(ids, **numbers))


def test_a_setting_that_does_not_exist(monkeypatch):
    monkeypatch.setenv(ways.VARIABLE, "fast")
    with pytest.raises(ValueError, match="auto, triton, onchip, got 'fast'"):
        ways.setting()
    monkeypatch.setenv(ways.VARIABLE, "")
    assert ways.setting() == "auto"


@without_gpu
def test_onchip_raises_where_it_cannot_run_and_auto_does_not(monkeypatch):
    case = make_case(B=2, T=2, V=32000, dtype=BF16)
    given = case.inputs("completion_ids", "advantages", "completion_mask")
    want = ours(case.logits, "triton", **given)[1]
    monkeypatch.setenv(ways.VARIABLE, "onchip")
    with pytest.raises(ValueError, match=r"NVIDIA GPU.*GRPO_KERNELS_ROWS=auto"):
        ours(case.logits, "triton", **given)
    for setting in ("auto", "triton"):
        monkeypatch.setenv(ways.VARIABLE, setting)
        assert torch.equal(ours(case.logits, "triton", **given)[1], want)


@pytest.mark.unshifted
@pytest.mark.parametrize(("V", "dtype"), ((32000, BF16), (50264, BF16), (262144, BF16), (16000, FP32), (50260, FP32)))
def test_what_the_kernel_takes(V, dtype):
    assert obstacle(torch.empty(2, 1, V, dtype=dtype)) is None


@pytest.mark.unshifted
def test_what_the_kernel_does_not_take():
    x = torch.empty(2, 2, 32008, dtype=BF16)
    assert "bfloat16 or float32, got torch.float16" in obstacle(x.half())
    assert "a multiple of 8" in obstacle(x[..., :32004])
    assert "a multiple of 4" in obstacle(x[..., :32002].float())
    assert "multiples of 16 bytes" in obstacle(torch.empty(2, 2, 32002)[..., :32000])
    assert "multiples of 16 bytes" in obstacle(x[..., 4:32004])
    assert "multiples of 16 bytes" in obstacle(torch.empty(2, 2, 32004, dtype=BF16)[..., :32000])
    assert "bytes or more, got 63984" in obstacle(x[..., :31992])
    assert "softcap" in obstacle(x, softcap=30.0)
    assert "the logits' dtype, torch.float32, got torch.bfloat16" in obstacle(x.float(), out=x)  # logits_dtype=float32
    assert "no tokens" in obstacle(x[:, :0])


class Gpu:
    """Properties of a device, in place of torch's."""

    def __init__(self, monkeypatch, major, minor, shared):
        self.major, self.minor, self.shared_memory_per_block_optin = major, minor, shared * 1024
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.version, "hip", None)


class Logits:
    is_cuda, device, dtype, shape = True, "cuda:0", BF16, (1, 1, 151936)


def test_gpus(monkeypatch):
    Gpu(monkeypatch, 8, 0, 163)
    assert "9.0 or newer, got 8.0" in ways.device_obstacle(Logits)
    Gpu(monkeypatch, 12, 0, 99)
    assert "227 KB of shared memory per program, got 99" in ways.device_obstacle(Logits)
    Gpu(monkeypatch, 9, 0, 227)
    assert ways.device_obstacle(Logits) is None
    for major, reason in ((9, None), (10, None), (12, "227 KB of shared memory per program, got 99")):
        del Gpu(monkeypatch, major, 0, 227).shared_memory_per_block_optin  # a torch that does not tell
        assert ways.device_obstacle(Logits) in (reason, f"needs {reason}")


def test_auto_goes_by_the_record(monkeypatch):
    Gpu(monkeypatch, 9, 0, 227)
    assert not ways._recorded(Logits, 0) or onchip_record.FASTER
    monkeypatch.setattr(ways, "FASTER", {(151936, "bfloat16", (9, 0), 0): (1.3, 1.1)})
    assert ways._recorded(Logits, 0) and not ways._recorded(Logits, 1)
    Gpu(monkeypatch, 10, 0, 227)
    assert not ways._recorded(Logits, 0)


@pytest.mark.parametrize(
    ("entropy", "numbers", "crowded"),
    (
        (False, (), 0),
        (False, ("ref", "temperature"), 0),
        (True, ("ref", "temperature"), 1),
        (False, ("ref", "temperature", "is_weight"), 1),
        (True, ("ref", "segments", "is_weight"), 2),
    ),
)
def test_auto_takes_no_shape_that_was_not_measured(monkeypatch, entropy, numbers, crowded):
    Gpu(monkeypatch, 9, 0, 227)
    monkeypatch.delenv(ways.VARIABLE, raising=False)
    monkeypatch.setattr(ways, "obstacle", lambda *call: None)
    batch = Batch(torch.zeros(1, 1), **dict.fromkeys(numbers, torch.zeros(1, 1)))
    for level in range(3):
        monkeypatch.setattr(ways, "FASTER", {(151936, "bfloat16", (9, 0), level): (1.3, 1.1)})
        taken = ways.on_chip(Logits, Logits, batch, entropy) is not None
        assert taken == (level == crowded), level
    monkeypatch.setenv(ways.VARIABLE, "onchip")
    assert ways.on_chip(Logits, Logits, batch, entropy) is not None


def test_the_table_is_that_of_the_records():
    assert kernels.TABLE.read_text(encoding="utf-8") == kernels.table_of(kernels.records())


def record(path, *rows):
    """Writes a record of (vocabulary, status, × copy of the on-chip kernel[, crowded]); the Triton kernel takes 1.3."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, kernels.FIELDS)
        writer.writeheader()
        for V, status, onchip, *crowded in rows:
            for mode in ("inplace", "loss"):
                row = {"capability": "9.0", "vocab": V, "dtype": "bf16", "masked": 0.0, "mode": mode}
                row["crowded"] = crowded[0] if crowded else ""  # older records do not say
                writer.writerow({**row, "implementation": "triton", "status": "ok", "copy_multiple": 1.3})
                writer.writerow({**row, "implementation": "onchip", "status": status, "copy_multiple": onchip})
    return path


def test_only_what_was_right_and_faster_in_both_modes_of_every_record_enters_the_table(tmp_path):
    one = record(tmp_path / "1.csv", (128256, "ok", 1.1), (32000, "wrong result", ""), (151936, "ok", 1.4))
    other = record(tmp_path / "2.csv", (128256, "ok", 1.2), (32000, "ok", 1.1), (262144, "ok", 1.25, 2))
    names: dict = {}
    exec(kernels.table_of([one, other]), names)
    assert names["FASTER"] == {
        (128256, "bfloat16", (9, 0), 0): (1.3, 1.2),
        (262144, "bfloat16", (9, 0), 2): (1.3, 1.25),
    }


@without_gpu
def test_the_benchmark_runs_without_a_gpu(capsys, tmp_path):
    assert kernels.main(["--seconds", "0.01", "--only", "masked", "--crowded", "0", "2", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "all inputs triton" in text
    assert "x copy" in text and "onchip          not run: needs an NVIDIA GPU" in text
    with (tmp_path / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["implementation"] for row in rows} == {"triton", "onchip"} and rows[0]["copy_multiple"]

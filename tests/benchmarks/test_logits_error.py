"""`python -m benchmarks.logits_error`: what it prints is what it measured, and fp32 logits are the better ones."""

import torch

from benchmarks import logits_error


def test_fp32_logits_are_the_better_ones(capsys):
    assert logits_error.main(["--rows", "24", "--hidden", "64", "--vocab", "1000", "--dtype", "bf16"]) == 0
    first, _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert "24 rows, H = 64, V = 1000" in first and torch.__version__ in first and head.count("|") == 7
    rounded, fp32 = ([x.strip() for x in line.strip("|").split("|")] for line in lines)
    assert (rounded[0], fp32[0]) == ("bfloat16", "float32")
    # logits up to 10: rounded by up to 2^-6 in bf16, of which fp32 sums of 64 products are off by less than 2^-17
    assert float(rounded[1]) > 2.0**-9 and float(fp32[1]) < 2.0**-15
    # 2^-9 on being written in both; beside that what rounding makes of the probabilities
    assert 2.0**-11 < float(fp32[3]) < float(rounded[3]) and float(fp32[3]) < 2.0**-7

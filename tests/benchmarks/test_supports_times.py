"""`python -m benchmarks.supports` at tiny sizes."""

import csv

from benchmarks import supports


def test_the_command(capsys, tmp_path):
    assert supports.main(["--seconds", "0.01", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    with (tmp_path / "supports.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"].split(":")[0], int(row["kept"])) for row in rows] == [
        *[("support", K) for K in (2, 8) for _ in range(3)], *[("targets", 2)] * 2, *[("head", 2)] * 2
    ]  # fmt: skip
    for row in rows:
        assert float(row["ms"]) > 0 and row["commit"] is not None
        assert (float(row["copy_multiple"] or 0) > 0) == (row["hidden"] == "0")

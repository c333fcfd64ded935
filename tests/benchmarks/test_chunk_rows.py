"""`python -m benchmarks.chunk_rows` at tiny sizes."""

import csv

import pytest

from benchmarks import chunk_rows


def test_the_command(capsys, tmp_path):
    assert chunk_rows.main(["--seconds", "0.01", "--shapes", "512x32", "300x16", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    with (tmp_path / "chunk_rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["vocab"]), int(row["rows"])) for row in rows] == [(512, 16), (512, 64), (300, 16), (300, 64)]
    for row in rows:
        assert int(row["chunk_bytes"]) == 2 * int(row["vocab"]) * int(row["rows"]) and row["torch"] and row["date"]
        assert all(float(row[f"{name}_ms"]) > 0 for name in ("logits", "hidden", "weight", "loss"))


def test_what_is_no_shape(capsys):
    with pytest.raises(SystemExit):
        chunk_rows.main(["--shapes", "512"])
    assert "--shapes" in capsys.readouterr().err

"""Every kernel compiles for GPUs that are not there: no spills, wide accesses, few exponentials."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import triton

from benchmarks import machine_code
from benchmarks.compile_launches import ALONE, KERNELS
from benchmarks.compile_report import TARGETS, _row_cost, _row_passes, defects
from grpo_kernels.objective.catalogue import KL_ESTIMATORS, TERMS
from grpo_kernels.objective.corrections import CORRECTIONS
from grpo_kernels.objective.plan import Plan

# For sm_90 the compilers of newer Tritons spill some registers of these forms, see docs/performance.md.
_FULL = {"loss_kernel clipped full bf16", "loss_kernel clipped support full bf16"}
SPILLING = {(3, 8): _FULL, (3, 9): _FULL | {"loss_kernel clipped packed bf16"}}
COMPILED = tuple(os.environ.get("GRPO_TESTS_TARGETS", "sm_90").split(","))  # test-variants has gfx942


def spilling() -> set[tuple[str, str]]:
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return {("sm_90", kernel) for kernel in SPILLING.get(version, ())} if "sm_90" in COMPILED else set()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(text, rows) of the report, from processes of their own: here the kernels are interpreted.

    In bf16 for two targets, every term for the first of them; `make compile-report` has every form for all targets.
    """
    folder = tmp_path_factory.mktemp("report")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    text, rows = "", []
    for dtype, targets in (("bf16", COMPILED),):
        file = folder / f"{dtype}.json"
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.compile_report", "--json", str(file), "--dtype", dtype,
             "--target", *targets, "--brief"],
            env={**env, "TRITON_CACHE_DIR": str(folder / "cache")}, capture_output=True, text=True,
        )  # fmt: skip
        assert file.exists(), done.stderr
        assert done.returncode == int(bool(spilling())), done.stdout + done.stderr
        text, rows = text + done.stdout, [*rows, *json.loads(file.read_text())["rows"]]
    return text, rows


@pytest.fixture(scope="module")
def row_kernels(report):
    return [row for row in report[1] if row["wanted"]]


def test_every_kernel_for_every_target(report):
    found = {(row["target"], row["kernel"].split()[0]) for row in report[1]}
    assert found == {(target, kernel) for target in COMPILED for kernel in KERNELS}


def test_every_term_divergence_and_correction_for_the_first_target(report):
    """In every kernel that holds it, but a divergence: one of them stands for all in the kernel of a sequence."""
    labels = [row["kernel"].split() for row in report[1] if row["target"] == COMPILED[0]]
    terms_in = lambda kernel: {label[1] for label in labels if label[0] == kernel}  # noqa: E731
    assert terms_in("sequence_kernel") == set(TERMS)
    assert terms_in("loss_kernel") == {name for name in TERMS if Plan(term=name).one_launch}
    divergences = [label[3] for label in labels if label[0] == "loss_kernel" and label[2] == "KL"]
    assert sorted(divergences) == sorted(KL_ESTIMATORS) and ALONE in KL_ESTIMATORS
    assert [label[0] for label in labels].count("correction_kernel") == len(CORRECTIONS)


def test_no_launch_relies_on_tritons_default_for_fp_fusion(report):
    """Triton fuses multiplications and additions by default up to 3.9, and no longer from 3.10 on."""
    assert [row["kernel"] for row in report[1] if row.get("enable_fp_fusion") is not True] == []


def test_no_defects(report):
    found = {(row["target"], row["kernel"]): defects(row) for row in report[1] if defects(row)}
    assert found.keys() == spilling() and all(len(each) == 1 and "spills" in each[0] for each in found.values())


def test_no_spills(report):
    bad = {(row["target"], row["kernel"]): row["spills"] for row in report[1] if row["spills"] or row["stack"]}
    assert bad.keys() == spilling() and all(spills <= 14 for spills in bad.values())


def test_wide_loads_and_stores(row_kernels):
    """V is a multiple of 16, so the loops over a row move 16 bytes a thread, all of them."""
    for row in row_kernels:
        assert row["V"] % 16 == 0 and row["wide_loads"]
        for loop in row["passes"].values():
            assert loop["loads"] == loop["wide_loads"] > 0 and loop["stores"] == loop["wide_stores"], row


def test_exponentials_per_element(row_kernels):
    """Counted in the machine code of the loops: one each in both passes. A soft cap takes one more in each.

    A part of a vocabulary has a running maximum, and takes one per tile for rescaling.
    """
    capped = [row["target"] for row in row_kernels if row["capped"]]
    # Those of distillation for the first target alone.
    assert [capped.count(target) for target in COMPILED] == [12, 6, 6, 6][: len(COMPILED)]
    for row in row_kernels:
        if row["capped"]:
            assert row["ex2_per_element"] <= 4.25, row
            continue
        if row["kernel"].startswith("whole_teacher_kernel"):  # per logit of either; of the reverse one q is not needed
            assert row["ex2_per_element"] <= 2.25, row
            continue
        found = {name: loop["ex2"] / loop["elements"] for name, loop in row["passes"].items()}
        assert sum(found.values()) == row["ex2_per_element"] <= 2.125, row
        assert found.get("first", 1) >= 1 and found.get("second", 1) == 1 and found.get("scale", 0) == 0, row


def test_loops_go_over_whole_tiles(row_kernels):
    """The loads of an iteration, by which its elements are counted, make up one tile or several."""
    for row in row_kernels:
        for loop in row["passes"].values():
            assert loop["elements"] >= row["tile_per_thread"] and loop["elements"] % row["tile_per_thread"] == 0, row


def test_the_table_fits_100_columns(report):
    lines = report[0].splitlines()
    assert len(lines) > len(report[1]) and max(map(len, lines)) <= 100


def test_the_kept_rows_are_what_the_report_prints(report):
    kept = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "offline" / "compile.txt"
    lines = kept.read_text(encoding="utf-8").splitlines()
    if not lines[0].startswith(f"Triton {triton.__version__}, V = 151936"):
        pytest.skip("the kept rows are of another Triton, which compiles to other machine code")
    compiled = [line for line in lines if " fp32 " not in line and line.startswith(COMPILED)]
    assert len(compiled) > 6 and set(compiled) <= set(report[0].splitlines())


# --- what counts as a defect -----------------------------------------------------------------------


def doctored(**changes) -> dict:
    """A row of the report, as good as it gets, with changes; those of the second pass as ``second``."""
    loop = {"loads": 2, "wide_loads": 2, "stores": 0, "wide_stores": 0}
    second = {**loop, "stores": 2, "wide_stores": 2, **changes.pop("second", {})}
    row = {"kernel": "loss_kernel x", "V": 32, "spills": 0, "stack": 0, "passes": {"first": loop, "second": second},
           "stores": 6, "wide_stores": 4, "half_loads": 1, "ex2_per_element": 2.5, "capped": False}  # fmt: skip
    return row | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"spills": 3, "stack": 8}, "3 spills, 8 bytes of stack"),
        ({"stack": 8}, "0 spills, 8 bytes of stack"),
        ({"second": {"wide_loads": 0}}, "2 narrow loads in the loop of the second pass"),
        ({"second": {"stores": 16, "wide_stores": 0}}, "16 narrow stores in the loop of the second pass"),
        ({"stores": 30}, "26 narrow stores"),
        ({"half_loads": 16}, "16 loads of 2 bytes"),
        ({"ex2_per_element": 3.5}, "3.50 exponentials per element"),
        ({"ex2_per_element": None}, "a loop over a row does not cover whole tiles"),
        ({"passes": {}}, "loops over a row: none, not first, second"),
    ],
)
def test_a_defect_is_named(changes, says):
    assert defects(doctored()) == []
    assert defects(doctored(**changes)) == [says]


def test_odd_rows_have_narrow_edges_and_no_more():
    """Once per pass, and once more for the first pass in its other form, the running maximum."""
    assert defects(doctored(V=33, stores=16, half_loads=4)) == []
    assert defects(doctored(V=33, half_loads=5)) == ["5 loads of 2 bytes"]
    assert defects(doctored(V=33, second={"wide_loads": 0})) == ["2 narrow loads in the loop of the second pass"]


def test_what_a_row_costs():
    """Two whole tiles of 2·4 entries and three lines of 2, of which one is half full; 10 instructions outside."""
    tile, line = {"elements": 4, "instructions": 20}, {"elements": 1, "instructions": 9}
    assert _row_cost(21, 2, {"first": tile}, {"first": line}, 10) == (10 + 2 * 20 + 3 * 9) * 2 / 21
    assert _row_cost(21, 2, {"first": tile}, {}, 10) == (10 + 3 * 20) * 2 / 21  # without lines one more tile


def test_the_rest_of_a_row_is_told_from_its_tiles():
    """By what it takes per element: unrolled, its loop may fetch as much as a tile."""
    loop = {"loads": 1, "stores": 0, "ex2": 1, "loaded": 32, "instructions": 100}
    rest, left = {**loop, "instructions": 130}, {**loop, "loaded": 8, "instructions": 40}
    passes, rests = _row_passes([rest, left, loop, {**loop, "loaded": 0}], 2)
    assert passes == {"first": {**loop, "elements": 16}} and rests == {"first": {**left, "elements": 4}}
    cheap = {**loop, "loaded": 16, "instructions": 40}  # does not cover a tile of 16
    assert _row_passes([cheap, loop], 2, 16)[0] == {"first": {**loop, "elements": 16}}


# --- reading machine code --------------------------------------------------------------------------


def test_loops_are_found_in_nvidia_code():
    """An inner loop in an outer one, and a branch backwards to a block that never comes back: no loop."""
    code = [
        (0, "MOV R0, R1"), (1, "LDG.E.EL.128 R4, desc[UR4][R2.64]"), (2, "MUFU.EX2 R4, R4"),
        (3, "LDG.E.U16 R5, desc[UR4][R2.64]"), (4, "@!P1 BRA 0x1"), (5, "@P2 BRA 0x0"),
        (6, "STG.E R1, [R2.64]"), (7, "EXIT"), (8, "@P0 BRA 0x6"), (9, "EXIT"),
    ]  # fmt: skip
    (loop,) = machine_code.loops(code, {4: 1, 5: 0, 8: 6}, {7, 9})
    assert loop == {"instructions": 4, "ex2": 1, "loads": 2, "wide_loads": 1, "half_loads": 1, "loaded": 18,
                    "stores": 0, "wide_stores": 0}  # fmt: skip


def test_a_loop_that_is_entered_in_its_middle_is_one_loop():
    """As LLVM lays it out for AMD: the exit test first, and two branches back to it."""
    code = [
        (0, "s_branch .B4"), (1, "s_add_u32"), (2, "s_cbranch_scc1 .B6"), (3, "v_add_u32"), (4, "s_cbranch_execz .B3"),
        (5, "global_load_dwordx4 v[4:7]"), (6, "v_exp_f32_e32"), (7, "global_store_dwordx2 v[4:5]"),
        (8, "global_load_ushort v1"), (9, "buffer_load_ubyte v1"), (10, "s_branch .B3"), (11, "s_endpgm"),
    ]  # fmt: skip
    (loop,) = machine_code.loops(code, {0: 3, 2: 11, 4: 1, 10: 1}, {0, 10, 11})
    assert loop == {"instructions": 10, "ex2": 1, "loads": 3, "wide_loads": 1, "half_loads": 1, "loaded": 19,
                    "stores": 1, "wide_stores": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("target", "registers", "warps", "programs"),
    [("sm_90", 64, 32, 1), ("sm_90", 65, 16, 1), ("sm_90", 32, 32, 2), ("sm_90", 16, 4, 16), ("sm_80", 255, 4, 2),
     ("gfx942", 64, 16, 2), ("gfx942", 65, 16, 1), ("gfx942", 128, 16, 1), ("gfx942", 20, 16, 2)],
)  # fmt: skip
def test_resident_programs(target, registers, warps, programs):
    assert machine_code.resident_programs(TARGETS[target], registers, warps) == programs


def test_rows_that_start_anywhere_do_not_spill_on_sm_100():
    """The forms of the loss that hold most numbers per row."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = ["-m", "benchmarks.compile_report", "--vocab", "50257", "--dtype", "bf16", "--target", "sm_100",
               "--only", "loss_kernel clipped (full|packed|skip) bf16"]  # fmt: skip
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kernels" in done.stdout and "0 defects" in done.stdout

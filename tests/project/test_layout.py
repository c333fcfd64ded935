"""The rules of the house, and that the script which checks them would say so."""

from pathlib import Path

import pytest

import layout

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_keeps_the_rules(capsys):
    assert layout.main([]) == 0, capsys.readouterr().out


@pytest.fixture
def house(tmp_path):
    def build(**files):
        for name, text in files.items():
            path = tmp_path / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"objective__kl": "import grpo_kernels.call.checks", "call__checks": ""}, "stands on a floor above it"),
        ({"cpu_backend__rows": "import grpo_kernels.triton_backend.row", "triton_backend__row": ""}, "backends"),
        ({"trainer__a": "import grpo_kernels.trainer.b", "trainer__b": "import grpo_kernels.trainer.a"}, "a circle"),
        ({"trainer__a": "import grpo_kernels.trainer.b", "trainer__b": "if 0:\n    import grpo_kernels.trainer.a"},
         "a circle of imports: trainer.a -> trainer.b -> trainer.a"),
        ({name: "" for name in "abcdef"} | {"metrics": ""}, "6 at most"),
        ({"api__a": "from grpo_kernels import LossConfig", "__init__": ""}, "imports the package itself"),
    ],
    ids=("floor", "backends", "circle", "late circle", "root", "public names"),
)  # fmt: skip
def test_a_breach_is_named(house, monkeypatch, files, said):
    if "6 at most" in said:
        monkeypatch.setattr(layout, "FLOORS", (*layout.FLOORS, tuple("abcdef")))
        monkeypatch.setattr(layout, "ROOT_MODULES", 6)
    found = layout.breaches(house(**files), [])
    assert any(said in breach for breach in found), found


def test_a_long_file_is_named(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("\n" * 401)
    assert layout.breaches(tmp_path / "none", [path]) == [f"{path}: 401 lines, 400 at most"]


def test_late_imports_may_lead_upwards(house):
    package = house(objective__kl="def f():\n    from grpo_kernels.call import checks\n", call__checks="")
    assert layout.breaches(package, []) == []

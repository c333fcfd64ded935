"""What the helpers of the tests keep: the truth of a call is another's only where all that it is given is equal."""

import torch

import cases
from cases import make_case


def test_a_truth_is_kept_for_equal_arguments_alone(monkeypatch):
    case, asked = make_case(V=17), []
    monkeypatch.setattr(cases, "_seen", {})
    monkeypatch.setattr(cases, "expected", lambda logits, **given: asked.append(given) or len(asked))
    monkeypatch.setattr(cases, "bounds", lambda *args, **given: None)
    given = {"completion_ids": case.completion_ids, "advantages": case.advantages, "beta": 0.1}
    moved = case.advantages.clone()
    moved[-1] += 1e-6
    for logits, more in (
        (case.logits, {}), (case.logits, {"advantages": moved}), (case.logits, {"beta": 0.2}),
        (case.logits.bfloat16(), {}), (case.logits + 1e-6, {}), (case.logits, {"loss_type": "dapo"}),
    ):  # fmt: skip
        count = len(asked)
        first = cases._truth(logits, None, given | more)[0]
        assert len(asked) == count + 1 and first == len(asked)
        assert cases._truth(logits.clone(), None, given | more)[0] == first and len(asked) == count + 1
    assert len(cases._seen) == 6
    large = torch.empty(1, 1, cases._LARGE + 1)
    assert cases._truth(large, None, given)[0] != cases._truth(large, None, given)[0]
    odd = {**given, "support": object()}
    assert cases._truth(case.logits, None, odd)[0] != cases._truth(case.logits, None, odd)[0]

"""The heads among which a hospital chooses, on embeddings made here."""

import pytest
import torch
from torch.nn import functional

from clinifed.evaluation.choice import choose
from clinifed.evaluation.metrics import patient_scores
from clinifed.jobs.own_heads import GLOBAL, LOCAL_ONLY, VARIANTS, ZERO_SHOT, Head, Recipe, candidates, logits
from clinifed.privacy.engine import PatientTensors
from clinifed.privacy.objectives import OBJECTIVES

WIDTH, LABELS = 16, 3
RECIPE = Recipe(OBJECTIVES["cross-entropy"], 1.0, 40, 0.0)


def drawn(patients: int, seed: int, means: torch.Tensor) -> PatientTensors:
    """Two images of each patient around its label's mean, of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(patients) % LABELS
    rows = means[label].repeat_interleave(2, 0)
    rows = rows + 0.6 * torch.randn(rows.shape, generator=generator)
    features = functional.normalize(rows, dim=-1)
    zeros = torch.zeros(2 * patients, dtype=torch.int64)
    return PatientTensors(features, torch.arange(patients).repeat_interleave(2), zeros, label.repeat_interleave(2))


def means(seed: int) -> torch.Tensor:
    return functional.normalize(torch.randn(LABELS, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def head(rows: torch.Tensor) -> Head:
    return Head(10 * rows, torch.zeros(LABELS))


def accuracy(which: Head, data: PatientTensors) -> float:
    return patient_scores(logits(which, data), data.patient.numpy(), data.label.numpy()).balanced_accuracy


def chosen(heads: dict[str, Head], data: PatientTensors) -> str:
    found = {name: logits(h, data) for name, h in heads.items()}
    patient, label = data.patient.numpy(), data.label.numpy()
    return choose(found, GLOBAL, patient, label, variants=VARIANTS, never_worse_than=LOCAL_ONLY).chosen


@pytest.mark.parametrize("pull", [0.3, 0.01])
def test_a_pulled_head_lies_where_its_regulariser_says(pull):
    """At the fixed point of w ← (1 − s)(w − η∇L) + s·w₀ the gradient is −s/(η(1 − s))·(w − w₀), with η = 1."""
    data, common = drawn(60, 1, means(1)), head(means(2))
    found = candidates(head(means(3)), common, data, RECIPE)[f"in-house, pull {pull:g}"]
    weight, bias = (t.clone().requires_grad_() for t in (found.weight, found.bias))
    loss = functional.cross_entropy(data.features @ weight.T + bias, data.label)
    gradients = torch.autograd.grad(loss, [weight, bias])
    for gradient, end, start in zip(gradients, (found.weight, found.bias), (common.weight, common.bias), strict=True):
        assert torch.allclose(gradient, -pull / (1 - pull) * (end - start), atol=2e-3)


def test_mixtures_lie_between_global_and_local_only_and_zero_shot_is_as_given():
    zero, common = head(means(3)), head(means(2))
    found = candidates(zero, common, drawn(30, 1, means(1)), RECIPE)
    local = found[LOCAL_ONLY]
    assert set(found) == {ZERO_SHOT, GLOBAL, LOCAL_ONLY, *VARIANTS}
    assert found[ZERO_SHOT] is zero
    assert torch.allclose(found["global with 25% local-only"].weight, 0.75 * common.weight + 0.25 * local.weight)


def test_local_only_is_the_head_that_the_federations_own_comparison_trains(make_contract):
    from clinifed.executors.trainer import local_steps
    from clinifed.models.adapters import TrainablePart
    from clinifed.models.heads import build_heads

    contract = make_contract({"alder": ["emergency"]}, dim=WIDTH)
    promise = contract.promise.model_copy(update={"mode": "off"})
    training = contract.training.model_copy(update={"learning_rate": 1.0, "pull": 0.1})
    contract = contract.model_copy(update={"promise": promise, "training": training})
    zero, data = head(means(3)), drawn(30, 1, means(1))
    part = TrainablePart(build_heads(contract.specialties, WIDTH))
    start = {"heads.emergency.weight": zero.weight, "heads.emergency.bias": zero.bias}
    part.load_shared(start)
    local_steps(part, start, data, contract, 10, 40)
    recipe = Recipe(OBJECTIVES["cross-entropy"], 1.0, 40, 0.1)
    local = candidates(zero, head(means(2)), data, recipe)[LOCAL_ONLY]
    assert torch.allclose(local.weight, part.shared()["heads.emergency.weight"], atol=1e-5)


def test_a_hospital_unlike_the_others_gets_a_head_of_its_own_and_one_like_them_keeps_the_global_one():
    own = means(1)
    train, held, fresh = (drawn(n, seed, own) for n, seed in ((120, 1), (90, 2), (300, 3)))
    unlike = candidates(head(means(3)), head(means(2)), train, RECIPE)
    picked = chosen(unlike, held)
    assert picked != GLOBAL
    assert accuracy(unlike[picked], fresh) > accuracy(unlike[GLOBAL], fresh) + 0.2
    assert accuracy(unlike[picked], fresh) >= accuracy(unlike[LOCAL_ONLY], fresh) - 0.03
    assert chosen(candidates(head(means(3)), head(own), train, RECIPE), held) == GLOBAL


def test_the_callers_threads_are_given_back():
    before = torch.get_num_threads()
    candidates(head(means(3)), head(means(2)), drawn(9, 1, means(1)), RECIPE)
    assert torch.get_num_threads() == before

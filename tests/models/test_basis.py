"""A public basis: it starts as zero-shot, is folded away without a trace, and only the agreed one is read."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from clinifed.config import Training
from clinifed.errors import ModelError
from clinifed.messages import head_name
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import load_backbone
from clinifed.models.basis import CONSTANT, make_basis, read_basis
from clinifed.models.specialties import SPECIALTIES

CHOSEN = {name: SPECIALTIES[name] for name in ("emergency", "radiology")}
KINDS = ("centre", "whitening", "pca")
DIM = 24


@pytest.fixture(scope="module")
def embeddings():
    """Unit rows with a long common direction, and variance that falls steeply."""
    dice = torch.Generator().manual_seed(0)
    spread = torch.randn(400, DIM, generator=dice) * torch.arange(1, DIM + 1) ** -1.0
    return functional.normalize(torch.ones(DIM) + spread, dim=1)


@pytest.fixture(scope="module")
def heads():
    dice = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(3, DIM, generator=dice), torch.randn(3, generator=dice)
    return {head_name("one", "weight"): 10 * weight, head_name("one", "bias"): bias}


def in_basis(basis, heads, rows):
    return basis(rows) @ heads[head_name("one", "weight")].T


def plain(heads, rows):
    return rows @ heads[head_name("one", "weight")].T + heads[head_name("one", "bias")]


@pytest.mark.parametrize("kind", ["centre", "whitening"])
def test_a_zero_shot_head_in_the_basis_gives_the_zero_shot_logits(kind, embeddings, heads):
    basis = make_basis(kind, embeddings)
    assert torch.allclose(in_basis(basis, basis.heads(heads), embeddings), plain(heads, embeddings), atol=1e-4)


def test_pca_drops_only_what_lies_outside_its_directions(embeddings, heads):
    basis = make_basis("pca", embeddings, 5)
    inside = basis.mean + (embeddings - basis.mean) @ basis.matrix @ torch.linalg.pinv(basis.matrix)
    assert torch.allclose(in_basis(basis, basis.heads(heads), embeddings), plain(heads, inside), atol=1e-4)
    assert not torch.allclose(plain(heads, inside), plain(heads, embeddings), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_heads_give_on_the_embedding_the_logits_that_the_heads_gave_in_the_basis(kind, embeddings, heads):
    basis = make_basis(kind, embeddings, 5)
    dice = torch.Generator().manual_seed(2)
    trained = {head_name("one", "weight"): 5 * torch.randn(3, basis.dims, generator=dice)}
    folded = basis.folded(trained)
    assert {name: tuple(t.shape) for name, t in folded.items()} == {n: tuple(t.shape) for n, t in heads.items()}
    assert torch.allclose(plain(folded, embeddings), in_basis(basis, trained, embeddings), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_public_rows_have_norm_1_on_average_and_mean_zero(kind, embeddings):
    rows = make_basis(kind, embeddings, 5)(embeddings)
    assert torch.equal(rows[:, -1], torch.full((len(rows),), CONSTANT))
    assert float(rows[:, :-1].norm(dim=1).mean()) == pytest.approx(1, abs=1e-4)
    assert torch.allclose(rows[:, :-1].mean(dim=0), torch.zeros(rows.shape[1] - 1), atol=1e-4)


@pytest.mark.parametrize(("kind", "kept"), [("whitening", DIM), ("pca", 5)])
def test_what_is_kept_varies_alike_where_it_varied_more_than_the_shrinkage(kind, kept, embeddings):
    spread = make_basis(kind, embeddings, 5)(embeddings)[:, :-1].std(dim=0)
    assert spread.shape == (kept,)
    assert spread.max() / spread[-3:].min() < 1.2
    assert (embeddings - embeddings.mean(dim=0)).std(dim=0).max() / embeddings.std(dim=0)[3] > 2  # as they came


@pytest.mark.parametrize(
    ("kind", "count", "dims", "said"),
    [
        ("whitening", DIM, 5, "of 24 dimensions from 24 public images, but it needs 48"),
        ("pca", 9, 5, "of 5 dimensions from 9 public images, but it needs 10"),
        ("pca", 400, DIM + 1, "basis_dims: 25, but the embedding has 24"),
        ("centre", 1, 5, "but it needs 2"),
    ],
)
def test_too_few_images_or_dimensions_are_refused(kind, count, dims, said, embeddings):
    with pytest.raises(ModelError, match=said):
        make_basis(kind, embeddings[:count], dims)


def test_embeddings_that_are_not_finite_or_all_the_same_are_refused(embeddings):
    with pytest.raises(ModelError, match="NaN"):
        make_basis("centre", torch.where(embeddings > embeddings.max() - 1e-6, float("nan"), embeddings))
    with pytest.raises(ModelError, match="are the same"):
        make_basis("centre", torch.ones(9, DIM))


def test_only_the_agreed_file_is_read(embeddings, tmp_path):
    basis, other = make_basis("pca", embeddings, 5), make_basis("centre", embeddings)
    path = tmp_path / "basis.safetensors"
    path.write_bytes(basis.content())
    read = read_basis(path, basis.sha256())
    assert torch.equal(read.matrix, basis.matrix)
    assert torch.equal(read.mean, basis.mean)
    assert read.sha256() == basis.sha256()
    with pytest.raises(ModelError, match=f"is basis {basis.sha256()}, the contract wants {other.sha256()}"):
        read_basis(path, other.sha256())


@pytest.mark.parametrize(
    "content",
    [
        {"mean": torch.zeros(4)},
        {"mean": torch.zeros(4), "matrix": torch.zeros(3, 2)},
        {"mean": torch.zeros(4), "matrix": torch.zeros(4, 2).double()},
        {"mean": torch.zeros(4), "matrix": torch.full((4, 2), float("inf"))},
        {"mean": torch.zeros(4), "matrix": torch.zeros(4, 2), "more": torch.zeros(1)},
    ],
)
def test_files_that_hold_something_else_are_refused(content, tmp_path):
    save_file(content, tmp_path / "file")
    with pytest.raises(ModelError, match="basis"):
        read_basis(tmp_path / "file")


def test_files_that_are_missing_or_no_safetensors_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"\x80\x04nonsense")
    for name in ("file", "none"):
        with pytest.raises(ModelError, match="cannot be read as a basis"):
            read_basis(tmp_path / name)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny")


@pytest.fixture(scope="module")
def based(backbone):
    width = backbone.encode_text(["a"]).shape[1]
    rows = functional.normalize(torch.randn(300, width, generator=torch.Generator().manual_seed(3)) + 0.3, dim=1)
    return backbone.with_basis(make_basis("whitening", rows))


@pytest.mark.parametrize("train", ["heads", "projection"])
def test_a_model_in_a_basis_starts_as_zero_shot_and_shares_no_basis(train, backbone, based):
    size = backbone.preprocess.size_px
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(4))
    part = build_trainable(based, CHOSEN, Training(train=train, basis="whitening"))
    bare = build_trainable(backbone, CHOSEN, Training(train=train))
    with torch.no_grad():
        inside, outside = GlobalModel(based, part)(pixels), GlobalModel(backbone, bare)(pixels)
    assert torch.equal(inside[0], outside[0])
    assert all(torch.allclose(inside[1][name], outside[1][name], atol=1e-3) for name in CHOSEN)
    names = {name for name in part.shared() if name.startswith("heads.")}
    assert names == {head_name(name, "weight") for name in CHOSEN}
    bare.load_shared(based.basis.folded(part.shared()))
    assert not any("basis" in name for name in part.shared())


def test_a_basis_that_is_missing_or_another_models_is_refused(backbone, embeddings):
    with pytest.raises(ModelError, match="clinifed basis CONFIG"):
        build_trainable(backbone, CHOSEN, Training(basis="centre"))
    other = backbone.with_basis(make_basis("centre", embeddings))
    with pytest.raises(ModelError, match="the basis is of 24 dimensions"):
        build_trainable(other, CHOSEN, Training(basis="centre"))

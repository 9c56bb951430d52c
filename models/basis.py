"""A public basis for the heads: embeddings centred, whitened, or reduced to their main directions, by public images.

All embeddings of a tower share one long direction, and vary strongly in few others. A head that reads them as they are
moves first, and furthest, along what all images share, which tells no class from another and only repeats how common
each class is; and noise falls on every coordinate alike. In a basis that is centred on public images, and in which what
is kept varies alike, the same noise drowns less (Mehta et al., arXiv 2211.13403, precondition by the covariance of the
features; here it is that of public images, which costs no epsilon). The basis is linear, so a trained head is folded
back into one that reads the embedding itself, and nothing after training knows of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from clinifed.config import MAX_BASIS_DIMS, BasisKind
from clinifed.errors import ModelError
from clinifed.files import sha256_of
from clinifed.messages import HEADS

__all__ = ["CONSTANT", "Basis", "InBasis", "make_basis", "read_basis"]

CONSTANT = 0.1  # the last coordinate of every row, on which a head keeps its bias; rows have norm 1 without it
# At 1, as long as all else together, steps large enough for the other directions made biases swing from round to round
# (`benchmarks/learning.py`: embeddings as they are).
SHRINKAGE = 0.1  # of the mean variance, added to each: directions that hardly vary are not blown up to be noise
_MIN_IMAGES = 2  # for each dimension that is kept
_MAX_BYTES = 64 << 20  # of the file


@dataclass(frozen=True)
class Basis:
    """z = ((embedding − mean) · matrix, CONSTANT), (B, d + 1).

    Guarantees:
        - A zero-shot head in the basis gives the zero-shot logits, up to what the basis drops; only ``pca`` drops any.
        - Folded heads give on the embedding the logits that the heads gave in the basis.
        - One patient counts as much as without a basis: public rows have norm 1 on average.
    """

    mean: Tensor  # (D,) float32
    matrix: Tensor  # (D, d) float32

    @property
    def dims(self) -> int:
        """What a head in the basis reads: d + 1."""
        return self.matrix.shape[1] + 1

    def __call__(self, embedding: Tensor) -> Tensor:
        """Embedding (B, D) → (B, d + 1), in the embedding's precision."""
        return InBasis.map(embedding, self.mean.to(embedding), self.matrix.to(embedding))

    def heads(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Heads that read the embedding, weight (K, D) and bias (K,) → heads in the basis, weight (K, d + 1) alone."""
        inverse = torch.linalg.pinv(self.matrix.double())  # (d, D)
        changed = dict(state)
        for weight, bias in _pairs(state):
            w = state[weight].double()
            b = changed.pop(bias).double() + w @ self.mean.double()
            changed[weight] = torch.cat([w @ inverse.T, b.unsqueeze(1) / CONSTANT], dim=1).float()
        return changed

    def folded(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Heads in the basis, weight (K, d + 1) → heads that read the embedding, weight (K, D) and bias (K,)."""
        changed = dict(state)
        for weight, bias in _pairs(state):
            w = state[weight][:, :-1].double() @ self.matrix.double().T
            changed[weight] = w.float()
            changed[bias] = (state[weight][:, -1].double() * CONSTANT - w @ self.mean.double()).float()
        return changed

    def content(self) -> bytes:
        """The basis as the bytes of a safetensors file; the same basis gives the same bytes."""
        content: bytes = save({"matrix": self.matrix.contiguous(), "mean": self.mean.contiguous()})
        return content

    def sha256(self) -> str:
        """Of :meth:`content`: how a contract names the basis."""
        return sha256_of(self.content())


class InBasis(nn.Module):
    """A basis as a module that never trains."""

    def __init__(self, basis: Basis) -> None:
        super().__init__()
        self.mean = nn.Parameter(basis.mean.clone(), requires_grad=False)
        self.matrix = nn.Parameter(basis.matrix.clone(), requires_grad=False)

    @staticmethod
    def map(embedding: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
        """What the basis does."""
        rows = (embedding - mean) @ matrix
        return torch.cat([rows, rows.new_full((len(rows), 1), CONSTANT)], dim=1)

    def forward(self, embedding: Tensor) -> Tensor:
        """Embedding (B, D) → (B, d + 1)."""
        return self.map(embedding, self.mean, self.matrix)


def make_basis(kind: BasisKind, embeddings: Tensor, dims: int = MAX_BASIS_DIMS) -> Basis:
    """The basis of public embeddings.

    Args:
        kind: ``centre`` takes off the mean and keeps all else; ``whitening`` makes all directions vary alike as well;
            ``pca`` keeps the ``dims`` in which public embeddings vary most, and makes these vary alike.
        embeddings: (N, D) float32, of images that no hospital owns; labels are not looked at.
        dims: of ``pca``.

    Raises:
        ModelError: there are too few embeddings, they are not finite, or ``dims`` is more than they have.
    """
    count, dim = embeddings.shape
    kept = dims if kind == "pca" else dim
    needed = _MIN_IMAGES * (1 if kind == "centre" else kept)
    problems = []
    if not 1 <= kept <= dim:
        problems.append(f"training.basis_dims: {dims}, but the embedding has {dim} dimensions; lower it")
    elif count < needed:
        problems.append(
            f"training.basis: {kind!r} of {kept} dimensions from {count} public images, but it needs {needed}; give a "
            "larger public validation set, take 'pca' with fewer basis_dims, or 'centre'"
        )
    if not bool(torch.isfinite(embeddings).all()):
        problems.append("the public embeddings hold NaN or infinity; look at the public validation images")
    if problems:
        raise ModelError(*problems)
    rows = embeddings.double()
    mean = rows.mean(dim=0)
    rows = rows - mean
    if kind == "centre":
        matrix = torch.eye(dim, dtype=torch.float64)
    else:
        variance, axes = torch.linalg.eigh(rows.T @ rows / (count - 1))  # ascending
        variance, axes = variance[-kept:].clamp(min=0), axes[:, -kept:]
        matrix = axes / (variance + SHRINKAGE * variance.mean()).sqrt()
    matrix = matrix / (rows @ matrix).norm(dim=1).mean()
    if not bool(torch.isfinite(matrix).all()):
        raise ModelError(f"training.basis: all {count} public embeddings are the same; give other public images")
    return Basis(mean.float(), matrix.float())


def read_basis(path: Path, sha256: str | None = None) -> Basis:
    """The basis in the file ``path``.

    Args:
        sha256: what the contract says; the file must be that one.

    Raises:
        ModelError: it is missing, damaged, or another one. Nothing is unpickled.
    """
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ModelError(f"{path}: has {size} bytes; a basis has at most {_MAX_BYTES}")
        content = path.read_bytes()
        if sha256 is not None and (found := sha256_of(content)) != sha256:
            raise ModelError(f"{path}: is basis {found}, the contract wants {sha256}; install the file that it names")
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as a basis ({type(error).__name__}: {error})") from error
    mean, matrix = tensors.get("mean"), tensors.get("matrix")
    fits = mean is not None and matrix is not None and mean.dim() == 1 and matrix.dim() == 2
    if not fits or len(tensors) != 2 or len(mean) != len(matrix):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ModelError(f"{path}: holds {shapes}, a basis is mean (D,) and matrix (D, d)")
    if any(t.dtype != torch.float32 or not bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise ModelError(f"{path}: a basis is finite float32")
    return Basis(mean, matrix)


def _pairs(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """(weight, bias) of every head of ``state``."""
    weights = [name for name in state if name.startswith(HEADS) and name.endswith(".weight")]
    return [(name, name.removesuffix("weight") + "bias") for name in weights]

"""Where fine-tuning starts: zero-shot, or a checkpoint, whose heads and trunk are taken as far as they mean the same.

A head is one row for each label, and a row is the prompt of its label plus what training changed. What is learned of
one label says something of another only where their prompts say the same. So between specialties a row's *change* is
carried over where two prompts are alike, and every other row starts as zero-shot. The trunk belongs to no specialty
and is carried over whole.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from clinifed.config import Specialty, Training
from clinifed.errors import ModelError
from clinifed.load import validate
from clinifed.messages import TRUNK, head_name
from clinifed.models.adapters import build_trainable
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.models.heads import prompt_matrix, zero_shot_heads
from clinifed.models.state import Checkpoint

__all__ = ["ALIKE", "Row", "Start", "base_of", "card_specialties", "start_from"]

ALIKE = 0.95  # cosine of two labels' prompt embeddings from which one's change is the other's; 1 for the same prompts
_SHAPING = ("rank", "blocks")  # of Training: what a trunk's shapes depend on besides its kind


@dataclass(frozen=True)
class Row:
    """One row of a head that starts with what another label's row learned."""

    label: str
    source: str  # the label in the other head
    cosine: float  # of the two prompt embeddings, in [-1, 1]


@dataclass(frozen=True)
class Start:
    """All that trains, as it is before the first step."""

    params: dict[str, Tensor]  # shared name → float32
    trunk: bool = False  # whether the trunk is a checkpoint's
    heads: tuple[str, ...] = ()  # specialties whose whole head is the checkpoint's own
    rows: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)  # specialty → rows from another specialty's head

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the parameters."""
        rows = {name: [asdict(row) for row in mine] for name, mine in self.rows.items()}
        return {"trunk": self.trunk, "heads": list(self.heads), "rows": rows}


def card_specialties(source: Checkpoint) -> dict[str, Specialty]:
    """The specialties of a checkpoint, by its card.

    Raises:
        ModelError: the card names none, or in no form that is known.
    """
    try:
        return TypeAdapter(dict[str, Specialty]).validate_python(source.card["specialties"])
    except (KeyError, ValidationError) as error:
        raise ModelError(f"{source.path}: the card's specialties cannot be read ({type(error).__name__})") from None


def base_of(source: Checkpoint, ref: str | None) -> Backbone:
    """The base model that a checkpoint was trained on.

    Args:
        ref: where it is, if not where the card says.

    Raises:
        ModelError: it cannot be loaded, or is another one.
    """
    base = source.card["base_model"]
    backbone = load_backbone(ref or base["ref"])
    if backbone.sha256 != base["sha256"]:
        raise ModelError(f"the base model is {backbone.sha256}, the checkpoint was trained on {base['sha256']}")
    return backbone


def start_from(
    source: Checkpoint,
    backbone: Backbone,
    specialties: Mapping[str, Specialty],
    training: Training,
    from_specialty: str | None = None,
    alike: float = ALIKE,
) -> Start:
    """The start of ``specialties`` from ``source``: its trunk, and of its heads what means the same.

    Without ``from_specialty`` a specialty that the checkpoint has starts with the checkpoint's head, any other as
    zero-shot. With it, every label whose prompt embedding has a cosine of ``alike`` or more with that of a label of
    ``from_specialty`` starts as W = τ·p + (Wₛ − τ·pₛ) and b = bₛ of the most alike one, and every other label as
    zero-shot: W = τ·p, b = 0, with the prompt embedding p and ``training.temperature`` τ.

    Args:
        alike: in (0, 1].

    Raises:
        ModelError: another base model, temperature, or kind of trunk; a head of other labels; no such specialty; or
            nothing of the checkpoint would be carried over. Every problem at once.
    """
    known = card_specialties(source)
    theirs = validate(Training, source.card.get("training", {}), f"{source.path}: training")
    problems = _problems(source, backbone, known, theirs, training, from_specialty)
    if not 0 < alike <= 1:
        problems.append(f"alike={alike!r}: a cosine in (0, 1]")
    if from_specialty is None:
        problems += [
            f"{source.path}: its head of {name} has the labels {list(known[name].labels)}, not {list(wanted.labels)}; "
            f"carry over what is alike with --from-specialty {name}"
            for name, wanted in specialties.items()
            if name in known and list(known[name].labels) != list(wanted.labels)
        ]
    if problems:
        raise ModelError(*problems)
    params = build_trainable(backbone, specialties, training).shared()
    trunk = {name: tensor for name, tensor in source.params.items() if name.startswith(TRUNK)}
    params |= trunk
    heads: list[str] = []
    rows: dict[str, tuple[Row, ...]] = {}
    for name, wanted in specialties.items():
        if from_specialty is not None:
            rows[name] = _carry_over(params, source, backbone, name, wanted, from_specialty, known, training, alike)
        elif name in known:
            params |= {head_name(name, p): source.params[head_name(name, p)] for p in ("weight", "bias")}
            heads.append(name)
    if not trunk and not heads and not any(rows.values()):
        raise ModelError(
            f"{source.path}: nothing of it is carried over to {', '.join(specialties)}: it has no trained trunk"
            + (
                ""
                if from_specialty is None
                else f", and no prompt is alike (cosine >= {alike:g}) to {from_specialty}'s"
            )
        )
    return Start(params, bool(trunk), tuple(heads), rows)


def _problems(
    source: Checkpoint,
    backbone: Backbone,
    known: Mapping[str, Specialty],
    theirs: Training,
    mine: Training,
    from_specialty: str | None,
) -> list[str]:
    problems = []
    base = source.card.get("base_model", {}).get("sha256")
    if base != backbone.sha256:
        problems.append(f"{source.path}: trained on base model {base}, not on {backbone.sha256}")
    if theirs.temperature != mine.temperature:
        problems.append(
            f"training.temperature: {mine.temperature:g}, but the heads of {source.path} have {theirs.temperature:g}; "
            "set it to the same"
        )
    differing = [key for key in _SHAPING if getattr(theirs, key) != getattr(mine, key)]
    if theirs.train != "heads" and (theirs.train != mine.train or differing):
        told = ", ".join(f"{key}: {getattr(theirs, key)}" for key in ("train", *_SHAPING))
        problems.append(
            f"training.train: {mine.train}, but {source.path} has a trunk of its own ({told}); use the same"
        )
    if from_specialty is not None and from_specialty not in known:
        problems.append(f"{source.path}: has no head of {from_specialty!r}, only of {', '.join(sorted(known))}")
    return problems


def _carry_over(
    params: dict[str, Tensor],
    source: Checkpoint,
    backbone: Backbone,
    name: str,
    wanted: Specialty,
    other: str,
    known: Mapping[str, Specialty],
    training: Training,
    alike: float,
) -> tuple[Row, ...]:
    """Add to the head ``name`` in ``params`` what the head ``other`` learned of labels with alike prompts."""
    cosines = prompt_matrix(backbone, wanted) @ prompt_matrix(backbone, known[other]).T  # (K, K of the other)
    start = zero_shot_heads(backbone, {other: known[other]}, training.temperature)
    sources, rows = list(known[other].labels), []
    for index, label in enumerate(wanted.labels):
        cosine, nearest = cosines[index].max(dim=0)
        if float(cosine) < alike - 1e-6:  # the same prompt is alike at 1, whatever float32 makes of its norm
            continue
        for part in ("weight", "bias"):
            learned = source.params[head_name(other, part)] - start[head_name(other, part)]
            params[head_name(name, part)][index] += learned[nearest]
        rows.append(Row(label, sources[int(nearest)], round(float(cosine), 6)))
    return tuple(rows)

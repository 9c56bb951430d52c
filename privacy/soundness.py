"""What may not train under differential privacy: modules that mix patients, data that samples them."""

from opacus.grad_sample import GradSampleHooks
from torch import nn

from clinifed.errors import PrivacyError
from clinifed.privacy.patients import PatientTensors

__all__ = ["refuse_other_data", "refuse_unsound"]


def refuse_unsound(module: nn.Module) -> None:
    """Raise PrivacyError for modules whose per-patient gradient does not depend on that patient alone."""
    batch, tracked, bare = [], [], []
    for name, m in module.named_modules():
        shown = f"{name or 'the module itself'} ({type(m).__name__})"
        # Its own, from where torch keeps them: to ask by name takes longer than a small step can spare.
        trained = [n for n, p in m._parameters.items() if p is not None and p.requires_grad]
        buffers = [n for n, b in m._buffers.items() if b is not None]
        # Frozen ones as well: in training mode, which Opacus needs, they mix or count patients all the same.
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            batch.append(shown)
        elif getattr(m, "track_running_stats", False) or "running_mean" in buffers or (trained and buffers):
            tracked.append(shown)
        elif trained and type(m) not in GradSampleHooks.GRAD_SAMPLERS:
            bare.append(f"{shown}: {', '.join(trained)}")
    problems = []
    if batch:
        problems.append(
            f"{'; '.join(batch)}: batch normalisation mixes the patients of a batch and keeps their statistics; use "
            "GroupNorm or LayerNorm"
        )
    if tracked:
        problems.append(
            f"{'; '.join(tracked)}: running statistics and other buffers beside what trains take in patients without "
            "noise; set track_running_stats=False, or use GroupNorm or LayerNorm"
        )
    if bare:
        problems.append(
            f"{'; '.join(bare)}: Opacus has no gradient per image for parameters held by such a module, for example "
            "a class token or a position embedding; freeze them (requires_grad=False), or hold them in nn.Linear"
        )
    if problems:
        raise PrivacyError(*problems)


def refuse_other_data(data: object) -> None:
    """Raise PrivacyError unless ``data`` is all patients of the site, at once and in order."""
    if isinstance(data, PatientTensors):
        data.check()
        return
    sampler = getattr(data, "batch_sampler", None) or getattr(data, "sampler", None)
    sampler = getattr(sampler, "sampler", sampler)
    by = f" with a {type(sampler).__name__}" if sampler is not None else ""
    raise PrivacyError(
        f"data is a {type(data).__name__}{by}: a loader samples, shuffles or pads its batches (Opacus' rand_on_empty "
        "makes up an image), and none of that is what is accounted; the only sampling is none, a full batch (q = 1): "
        "give PatientTensors with all patients"
    )

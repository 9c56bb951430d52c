"""``clinifed privacy audit``: the installed mechanism under attack, with the numbers of a configuration."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clinifed.errors import ConfigError
from clinifed.load import load_federation

__all__ = ["audit_federation"]


def audit_federation(config: Path, overrides: Sequence[str], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run every audit on synthetic patients; no patient of the configuration is read.

    Returns:
        What was audited, and a row per audit with ``passed``, ``says`` and its figures.

    Raises:
        ConfigError: a setting is wrong, or privacy is off: then there is nothing to audit.
        PrivacyError: the objective may not run.
    """
    federation = load_federation(config, overrides)
    privacy = federation.privacy
    if privacy.mode == "off":
        raise ConfigError(f"{config}: privacy: off adds no noise that could be audited; set privacy.mode=dp")
    from clinifed.privacy.audit import audit
    from clinifed.privacy.claims import statement
    from clinifed.privacy.self_test import self_test

    releases = (federation.rounds + privacy.reserve_rounds) * federation.training.local_epochs
    nominal = min(federation.nominal_patients(site) for site in federation.sites)
    progress(f"auditing {releases} releases at epsilon {privacy.epsilon:g}, delta {privacy.delta:g} per patient")
    self_test()
    results = audit(privacy.objective, privacy.epsilon, privacy.delta, releases, privacy.max_grad_norm, nominal)
    return {
        "config": str(config),
        "objective": privacy.objective,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        **statement(),
        "releases": releases,
        "max_grad_norm": privacy.max_grad_norm,
        "nominal_patients": nominal,
        "audits": [result.to_dict() for result in results],
    }

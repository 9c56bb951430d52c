"""The plan of a federation from its configuration, and the tables that show a plan."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from clinifed.errors import ConfigError
from clinifed.load import load_federation
from clinifed.messages import TRUNK
from clinifed.privacy.expectations import study
from clinifed.privacy.plan import Plan, plan_of_contract

__all__ = ["plan_federation", "plan_tables"]


def plan_federation(config: Path, overrides: Sequence[str] = (), cross_check: bool = False) -> Plan:
    """The plan of the contract that the federation in ``config`` makes.

    The base model is loaded, since it says how many parameters train.

    Args:
        overrides: ``key=value`` settings, applied before the check.
        cross_check: also ask other accountants.

    Raises:
        ConfigError: with every wrong setting; or privacy is off.
        PrivacyError: no noise pays for it, or another accountant disagrees.
    """
    federation = load_federation(config, overrides)
    if federation.privacy.mode == "off":
        raise ConfigError(f"{config}: privacy: off has no budget to plan; set privacy.mode=dp")
    # Both load torch; a wrong setting is told before.
    from clinifed.jobs.basis import planned_basis
    from clinifed.jobs.recipe import build_contract
    from clinifed.models.backbone import load_backbone

    backbone = planned_basis(federation, load_backbone(federation.model.ref))
    return plan_of_contract(build_contract(federation, backbone), cross_check)


def plan_tables(plan: Plan) -> tuple[Table, ...]:
    """What the run costs; who can learn; and what other accountants say, where they were asked."""
    tables = [_cost(plan)]
    if plan.feasibility:
        tables += [_feasibility(plan), _expectations(plan)]
    if plan.cross_checks is not None:
        tables.append(_cross_checks(plan))
    return tuple(tables)


def _cost(plan: Plan) -> Table:
    relation = plan.relation.replace("_", "/")
    title = (
        f"privacy per {plan.unit} ({relation}, delta {plan.delta:g}), per site, for the whole run\n{plan.trust_model}"
    )
    table = Table(title=title)
    table.add_column("what")
    table.add_column("value", justify="right")
    steps = "" if plan.local_steps == 1 else f" · {plan.local_steps} steps"
    reserve = f"({plan.rounds} + {plan.reserve_rounds} in reserve)" if plan.reserve_rounds else f"{plan.rounds}"
    for name, value in (
        ("noise multiplier (sigma)", f"{plan.noise_multiplier:.4f}"),
        ("clip of one patient's gradient (max_grad_norm)", f"{plan.max_grad_norm:g}"),
        ("releases", f"{plan.releases} = {reserve} rounds{steps}"),
        ("rounds held in reserve for crashes", str(plan.reserve_rounds)),
        ("epsilon asked", f"{plan.epsilon_asked:g}"),
        ("epsilon of all releases", f"{plan.epsilon:.6f}"),
        ("epsilon if nothing crashes", f"{plan.epsilon_without_crash:.6f}"),
        ("epsilon that a crashed round loses", f"{plan.epsilon_per_crash:.6f}"),
        ("units per release / in all (1e-12 of mu squared)", f"{plan.units_per_release:,} / {plan.units:,}"),
    ):
        table.add_row(name, value)
    return table


def _feasibility(plan: Plan) -> Table:
    table = Table(title="noise over the largest possible signal")
    for column in ("site", "specialty"):
        table.add_column(column, no_wrap=True)
    for column in ("N₀", "patients, estimated", "d", "alone", "sites", "together"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for row in plan.feasibility:
        table.add_row(
            row.site,
            row.specialty,
            str(row.nominal_patients),
            f"{row.estimated_patients:.0f}",
            f"{row.parameters:,}",
            f"{row.noise_to_signal:.2f}",
            str(row.sites),
            f"{row.federated_noise_to_signal:.2f}",
            row.verdict,
        )
    return table


def _expectations(plan: Plan) -> Table:
    told = study()
    title = (
        f"what to expect, by the {told['source']}: {told['labels']} classes, balanced accuracy, 95 % over "
        f"{told['seeds']} seeds,\nin a public basis (training.basis) of {told['dims']} directions; the nearest case "
        "that is no larger"
    )
    table = Table(title=title)
    for column in ("site", "specialty"):
        table.add_column(column, no_wrap=True)
    for column in ("case", "zero-shot", "federated", "gain"):
        table.add_column(column, overflow="fold")
    for row in plan.feasibility:
        found = row.expectation
        if found is not None:
            cells = (
                f"{found.patients:,} patients, epsilon {found.epsilon:g}, {found.sites} site{'s' * (found.sites > 1)}",
                f"{found.zero_shot:.2f}",
                f"{found.balanced_accuracy:.2f} ± {found.interval:.2f}",
                f"{found.gain:+.2f} ± {found.gain_interval:.2f}" + ("" if found.learns else ": none shown"),
            )
            table.add_row(row.site, row.specialty, *cells)
        elif row.specialty != TRUNK.rstrip("."):  # the study is of heads
            table.add_row(row.site, row.specialty, "smaller than any", "–", "–", "–")
    return table


def _cross_checks(plan: Plan) -> Table:
    table = Table(title="the same releases by other accountants")
    for column in ("accountant", "version", "epsilon", "remark"):
        table.add_column(column, justify="right" if column == "epsilon" else "left", overflow="fold")
    for check in (plan.cross_checks or {}).values():
        epsilon = "–" if check.epsilon is None else f"{check.epsilon:.4f}"
        table.add_row(check.accountant, check.version, epsilon, check.reason or "")
    return table

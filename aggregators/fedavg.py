"""Federated averaging: the trunk over all sites, each head over the sites of its specialty."""

from collections.abc import Mapping, Sequence

import numpy as np

from clinifed.messages import Parameters, Update

__all__ = ["fedavg"]


def fedavg(
    updates: Sequence[Update], weights: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]
) -> Parameters:
    """The weighted mean of the updates, parameter by parameter (McMahan et al., arXiv 1602.05629, on differences).

    Args:
        updates: checked updates, at most one per site.
        weights: site → weight > 0, from the contract.
        shapes: every shared parameter's shape.

    Returns:
        name → float32 array for every name of ``shapes``.

    Guarantees:
        - A parameter is averaged over exactly the sites that sent it; its weights are normalised over these.
        - A parameter nobody sent changes by zero.
        - The result does not depend on the order of arrival: sites are summed in sorted order, in float64.
    """
    mean: Parameters = {}
    for name, shape in shapes.items():
        senders = sorted((u for u in updates if name in u.params), key=lambda u: u.site)
        total = np.zeros(shape, dtype=np.float64)
        for update in senders:
            total += weights[update.site] * update.params[name].astype(np.float64)
        if senders:
            total /= sum(weights[u.site] for u in senders)
        mean[name] = total.astype(np.float32)
    return mean

"""The handshake before a job's first round: does a site hold what the contract says?"""

from typing import Any

from clinifed.contract import Contract

__all__ = ["disagreements"]


def disagreements(told: Any, contract: Contract) -> tuple[str, str]:
    """A short reason and the values on both sides, or two empty texts where a site agrees.

    Args:
        told: what the site says of itself: ``contract_sha256``, ``clinifed_version``, ``base_model_sha256``.

    Guarantees:
        - A site agrees only if all three are equal, letter by letter.
    """
    expected = {
        "contract_sha256": contract.sha256(),
        "clinifed_version": contract.clinifed_version,
        "base_model_sha256": contract.base_model.sha256,
    }
    if not isinstance(told, dict):
        return "wrong_handshake", f"it answered {type(told).__name__}"
    said = {key: told.get(key) for key in expected}
    # Of a foreign type, a comparison might be anything: an array has no truth, and an object its own idea of equality.
    wrong = {
        key: (said[key], value) for key, value in expected.items() if type(said[key]) is not str or said[key] != value
    }
    if not wrong:
        return "", ""
    # The first is the reason for tables; the text has them all. A site's word is cut: it may be anything.
    text = "; ".join(f"{key} is {str(theirs)[:80]!r} there, {ours!r} here" for key, (theirs, ours) in wrong.items())
    return f"other_{next(iter(wrong))}", text

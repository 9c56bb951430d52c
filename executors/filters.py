"""What stands at a hospital's door: a FLARE filter of the site's own privacy scope, which no job can take off.

It belongs into the site's ``local/privacy.json``, which ``privacy_scope`` writes. FLARE applies a site's filters before
those of a job, so the executor refuses a job that brings any.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FilterKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from clinifed.errors import PrivacyError
from clinifed.messages import META_KEYS, TASK_HANDSHAKE, Update, packed, release_sha256, unpacked
from clinifed.policy import SitePolicy, find_policy
from clinifed.privacy.ledger import Ledger

__all__ = ["ReleaseFilter", "policy_of", "privacy_scope", "to_shareable"]

_SCOPE = "hospital"
_HASH = re.compile(r"[0-9a-f]{64}")
_HANDSHAKE = {
    "contract_sha256": _HASH,
    "clinifed_version": re.compile(r"[0-9A-Za-z.+]{1,40}"),
    "base_model_sha256": _HASH,
}


def privacy_scope() -> dict[str, Any]:
    """A site's ``local/privacy.json``: one scope, the default, with the release filter on the way out."""
    path = f"{ReleaseFilter.__module__}.{ReleaseFilter.__qualname__}"
    release = {"path": path, "args": {}, "direction": FilterKey.OUT}
    return {"scopes": [{"name": _SCOPE, "task_result_filters": [release]}], "default_scope": _SCOPE}


def policy_of(fl_ctx: FLContext) -> SitePolicy:
    """The policy of the site that this process is."""
    local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
    return find_policy(local, fl_ctx.get_identity_name())


def to_shareable(update: Update, *, pack: bool = False) -> Shareable:
    """``update`` as FLARE sends it; with ``pack`` as bfloat16's bits, where all its values are such."""
    params = packed(update.params) if pack else dict(update.params)
    return FLModelUtils.to_shareable(
        FLModel(params_type=ParamsType.DIFF, params=params, current_round=update.round, meta=dict(update.meta))
    )


class ReleaseFilter(Filter):
    """Lets a charged release out, and nothing else.

    Guarantees:
        - Under differential privacy, a result leaves only if the site's ledger holds its hash as a release.
        - Nothing leaves with it but the names of ``clinifed.messages.META_KEYS``, and of ``declared`` only what the
          policy declares.
        - A failure leaves as a bare return code.
        - The handshake leaves as three words of a fixed form: two hashes and a version.
        - Whatever it cannot check does not leave.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The same release, put together anew from what may leave.

        Raises:
            PrivacyError: it may not leave; FLARE then sends a bare return code.
        """
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            return make_reply(code)
        if set(shareable) <= {ReservedHeaderKey.HEADERS}:
            return make_reply(code)  # nothing in it
        if set(shareable) == {ReservedHeaderKey.HEADERS, TASK_HANDSHAKE}:
            return _handshake(shareable[TASK_HANDSHAKE], fl_ctx.get_identity_name())
        policy = policy_of(fl_ctx)
        update, pack = self._update(shareable, policy.site)
        self._check(update, policy)
        return to_shareable(update, pack=pack)

    def _update(self, shareable: Shareable, site: str) -> tuple[Update, bool]:
        """The update in ``shareable``, which must hold it and nothing else, and whether it is packed."""
        try:
            dxo = from_shareable(shareable)
        except ValueError:
            raise PrivacyError(f"site {site}: a result that is neither an update nor a handshake stays here") from None
        headers = shareable.get(ReservedHeaderKey.HEADERS, {})
        plain = to_shareable(Update(site, 0, {}))  # what FLARE's own form of an update has
        strange = sorted(map(str, set(shareable) - set(plain)))
        strange += sorted(map(str, set(headers) - set(plain[ReservedHeaderKey.HEADERS]) - {ReservedHeaderKey.RC}))
        strange += sorted(map(str, set(dxo.meta) - set(META_KEYS)))
        if dxo.data_kind != DataKind.WEIGHT_DIFF:
            strange.append(f"data of kind {dxo.data_kind}")
        if strange:
            raise PrivacyError(f"site {site}: not on the list of what may leave: {', '.join(strange)}")
        sent = dxo.data if isinstance(dxo.data, dict) else {"": None}
        pack = bool(sent) and all(isinstance(v, np.ndarray) and v.dtype == np.uint16 for v in sent.values())
        params = unpacked(sent) if pack else dict(sent)  # the ledger's hash is of the values
        values = params.values()
        if not all(isinstance(v, np.ndarray) and v.dtype == np.float32 and np.isfinite(v).all() for v in values):
            raise PrivacyError(f"site {site}: a parameter is not a finite float32 array")
        return Update(site, shareable.get_header(AppConstants.CURRENT_ROUND), params, dict(dxo.meta)), pack

    def _check(self, update: Update, policy: SitePolicy) -> None:
        undeclared = sorted(set(update.meta.get("declared", {})) - set(policy.declare))
        if undeclared:
            raise PrivacyError(f"site {policy.site}: the policy does not declare {', '.join(undeclared)}")
        if policy.permit_privacy_off and update.meta["claim"]["epsilon"] is None:
            return  # public or synthetic data, by the policy's word; nothing is promised of it
        job = Ledger.of(policy).account().jobs.get(update.meta["job"])
        nonce = update.meta["nonce"]
        if job is None or job.releases.get(nonce) != release_sha256(update) or job.charges[nonce][0] != update.round:
            raise PrivacyError(f"site {policy.site}: no charge in the ledger pays for this release; it does not leave")


def _handshake(facts: Any, site: str) -> Shareable:
    """The handshake, put together anew. Raises PrivacyError where it is not exactly that."""
    words = facts if isinstance(facts, dict) else {}
    if set(words) != set(_HANDSHAKE) or not all(
        isinstance(words[key], str) and form.fullmatch(words[key]) for key, form in _HANDSHAKE.items()
    ):
        raise PrivacyError(f"site {site}: a handshake holds {', '.join(_HANDSHAKE)}, and nothing else")
    reply = make_reply(ReturnCode.OK)
    reply[TASK_HANDSHAKE] = dict(words)
    return reply

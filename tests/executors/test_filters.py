"""The door of a hospital: a charged release leaves as it is, everything else does not leave at all."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from clinifed.errors import PrivacyError
from clinifed.executors.filters import ReleaseFilter, privacy_scope, to_shareable
from clinifed.executors.flare import SiteExecutor, _refuse_open_door
from clinifed.executors.release import Releases
from clinifed.messages import META_KEYS, TASK_HANDSHAKE, Update, packed, unpacked
from clinifed.policy import POLICY_FOLDER, SitePolicy

from .conftest import JOB


def context(local, site="alder", **props) -> FLContext:
    """A FLARE context of a site whose folder is ``local``."""
    made = FLContext()
    workspace = SimpleNamespace(get_site_config_dir=lambda: str(local))
    made.set_prop(ReservedKey.IDENTITY_NAME, site, private=True)
    made.set_prop(ReservedKey.ENGINE, SimpleNamespace(get_workspace=lambda: workspace), private=True)
    for key, value in props.items():
        made.set_prop(key, value, private=True)
    return made


@pytest.fixture
def site(contract, policy, prepared, tmp_path):
    """A site with one charged release: (context, the release, its policy file)."""
    approved = policy.model_copy(update={"approved_contracts": (contract.sha256(),)})
    folder = tmp_path / "local" / POLICY_FOLDER
    folder.mkdir(parents=True)

    def save(changed: SitePolicy) -> None:
        (folder / "alder.yaml").write_text(yaml.safe_dump(changed.model_dump(mode="json")))

    save(approved)
    releases = Releases(contract, approved, JOB)
    releases.reserve(prepared.sites["alder"])
    params = {name: np.ones(shape, np.float32) for name, shape in contract.shapes.items()}
    update = releases.release(0, lambda: (params, {}))
    return SimpleNamespace(context=context(tmp_path / "local"), update=update, policy=approved, save=save)


def leave(site, shareable: Shareable) -> Shareable:
    return ReleaseFilter().process(shareable, site.context)


def test_a_charged_release_leaves_as_it_is_and_with_nothing_else(site):
    left = from_shareable(leave(site, to_shareable(site.update)))
    assert set(left.meta) <= set(META_KEYS)
    assert left.meta == dict(site.update.meta)
    assert all((left.data[name] == value).all() for name, value in site.update.params.items())


def test_a_packed_release_leaves_packed_and_is_looked_up_by_its_values(site):
    left = from_shareable(leave(site, to_shareable(site.update, pack=True)))
    assert all(value.dtype == np.uint16 for value in left.data.values())
    sent = unpacked(left.data)
    assert all((sent[name] == value).all() for name, value in site.update.params.items())
    other = {name: value + 1 for name, value in packed(site.update.params).items()}
    with pytest.raises(PrivacyError, match="no charge in the ledger pays"):
        leave(site, to_shareable(replace(site.update, params=unpacked(other)), pack=True))


def changed(update: Update, **meta) -> Update:
    return replace(update, meta={**update.meta, **meta})


UNCHARGED = {
    "parameters that were not released": lambda u: replace(u, params={k: v + 1 for k, v in u.params.items()}),
    "another round": lambda u: replace(u, round=1),
    "another job": lambda u: changed(u, job="another"),
    "another nonce": lambda u: changed(u, nonce="0" * 32),
    "another claim": lambda u: changed(u, claim={**u.meta["claim"], "epsilon": 0.0}),
    "one parameter less": lambda u: replace(u, params=dict(list(u.params.items())[1:])),
    "a figure that was not declared": lambda u: changed(u, declared={"patient_count": 12}),
    "a key that is not on the list": lambda u: changed(u, NUM_STEPS_CURRENT_ROUND=12),
    "float64": lambda u: replace(u, params={k: v.astype(np.float64) for k, v in u.params.items()}),
    "NaN": lambda u: replace(u, params={k: v * np.float32("nan") for k, v in u.params.items()}),
    "privacy off, by its own word": lambda u: changed(u, claim={**u.meta["claim"], "epsilon": None}),
}


@pytest.mark.parametrize("change", UNCHARGED.values(), ids=UNCHARGED)
def test_what_was_not_charged_does_not_leave(site, change):
    with pytest.raises(PrivacyError):
        leave(site, to_shareable(change(site.update)))


def test_headers_and_contents_beside_the_update_do_not_leave(site):
    for spoil in (
        lambda s: s.set_header("path", "/data/MILLER^ANNA"),
        lambda s: s.update({"train_loss": 0.1}),
    ):
        message = to_shareable(site.update)
        spoil(message)
        with pytest.raises(PrivacyError, match="not on the list"):
            leave(site, message)


@pytest.mark.parametrize("kind", [ParamsType.FULL, "metrics"])
def test_whole_models_and_metrics_do_not_leave(site, kind):
    model = (
        FLModel(metrics={"loss": 0.5}, current_round=0)
        if kind == "metrics"
        else FLModel(params_type=kind, params=dict(site.update.params), current_round=0, meta=dict(site.update.meta))
    )
    with pytest.raises(PrivacyError, match="data of kind"):
        leave(site, FLModelUtils.to_shareable(model))


def test_a_failure_leaves_as_a_bare_return_code(site):
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION, {"why": "could not read /data/MILLER^ANNA.dcm"})
    reply["trace"] = "secret"
    left = leave(site, reply)
    assert dict(left) == {ReservedHeaderKey.HEADERS: {ReservedHeaderKey.RC: ReturnCode.EXECUTION_EXCEPTION}}


def test_without_a_policy_or_a_ledger_nothing_leaves(site):
    message = to_shareable(site.update)
    site.policy.ledger.rename(site.policy.ledger.with_name("gone"))
    with pytest.raises(PrivacyError):
        leave(site, message)
    site.save(site.policy.model_copy(update={"site": "birch"}))
    with pytest.raises(PrivacyError):
        leave(site, message)


def test_a_declared_figure_leaves_once_the_policy_declares_it(site, contract, prepared):
    declaring = site.policy.model_copy(update={"declare": ("patient_count",)})
    releases = Releases(contract, declaring, JOB)
    update = releases.release(1, lambda: (dict(site.update.params), {"patient_count": 12}))
    with pytest.raises(PrivacyError, match="does not declare patient_count"):
        leave(site, to_shareable(update))
    site.save(declaring)
    assert from_shareable(leave(site, to_shareable(update))).meta["declared"] == {"patient_count": 12}


class TestDoor:
    """Nothing runs at a site whose door stands open."""

    @pytest.fixture(autouse=True)
    def logs_stay(self, monkeypatch):
        monkeypatch.setattr("clinifed.executors.flare.is_log_streaming_allowed", lambda fl_ctx: False)

    def scope(self, *filters) -> SimpleNamespace:
        return SimpleNamespace(task_result_filters={"out": list(filters), "in": []})

    def test_without_the_release_filter_nothing_runs(self, tmp_path):
        for scope in (None, self.scope(), self.scope(ReleaseFilter(), object())):
            with pytest.raises(PrivacyError, match="ReleaseFilter as its last result filter"):
                _refuse_open_door(context(tmp_path, **{FLContextKey.SCOPE_OBJECT: scope}))

    def test_a_job_that_brings_filters_does_not_run(self, tmp_path):
        runner = SimpleNamespace(task_result_filters={"train_out": [object()]}, task_data_filters={})
        props = {FLContextKey.SCOPE_OBJECT: self.scope(ReleaseFilter()), FLContextKey.RUNNER: runner}
        with pytest.raises(PrivacyError, match="filters of its own"):
            _refuse_open_door(context(tmp_path, **props))

    def test_where_flare_streams_the_sites_log_nothing_runs(self, tmp_path, monkeypatch):
        monkeypatch.undo()  # without a word in resources.json, FLARE's default is to stream
        props = {FLContextKey.SCOPE_OBJECT: self.scope(ReleaseFilter())}
        with pytest.raises(PrivacyError, match="allow_log_streaming"):
            _refuse_open_door(context(tmp_path, **props))

    def test_with_the_filter_last_and_no_others_it_runs(self, tmp_path):
        runner = SimpleNamespace(task_result_filters={}, task_data_filters={})
        props = {FLContextKey.SCOPE_OBJECT: self.scope(object(), ReleaseFilter()), FLContextKey.RUNNER: runner}
        _refuse_open_door(context(tmp_path, **props))


def test_the_scope_is_the_default_and_its_filter_is_ours_on_the_way_out():
    scope = privacy_scope()
    assert scope["default_scope"] == scope["scopes"][0]["name"]
    (only,) = scope["scopes"][0]["task_result_filters"]
    assert (only["path"], only["direction"]) == ("clinifed.executors.filters.ReleaseFilter", "out")


def test_the_executor_answers_no_other_task(contract, tmp_path):
    executor = SiteExecutor(contract.text(), "run")
    reply = executor.execute("submit_model", Shareable(), context(tmp_path), SimpleNamespace(triggered=False))
    assert reply.get_return_code() == ReturnCode.TASK_UNKNOWN


WORDS = {"contract_sha256": "a" * 64, "clinifed_version": "0.1.0+local", "base_model_sha256": "0" * 64}


def handshake(words, **beside) -> Shareable:
    reply = make_reply(ReturnCode.OK)
    reply[TASK_HANDSHAKE] = words
    reply.update(beside)
    return reply


class TestHandshake:
    """The handshake leaves as three words of a fixed form: two hashes and a version."""

    def test_the_three_words_leave_and_nothing_else(self, site):
        sent = handshake(dict(WORDS))
        sent.set_header("path", "/data/MILLER^ANNA")
        left = leave(site, sent)
        assert dict(left) == {ReservedHeaderKey.HEADERS: {ReservedHeaderKey.RC: ReturnCode.OK}, TASK_HANDSHAKE: WORDS}

    def test_it_leaves_before_the_site_has_a_policy(self, tmp_path):
        left = ReleaseFilter().process(handshake(WORDS), context(tmp_path / "nothing"))
        assert left[TASK_HANDSHAKE] == WORDS

    @pytest.mark.parametrize(
        "words",
        [
            {},
            None,
            "abc",
            [WORDS],
            {k: v for k, v in WORDS.items() if k != "clinifed_version"},
            {**WORDS, "patients": "12"},
            *(
                {**WORDS, key: value}
                for key in WORDS
                for value in ("MILLER^ANNA", "", None, 12, "a" * 65, "a" * 64 + "\n")
            ),
            {**WORDS, "contract_sha256": "A" * 64},
            {**WORDS, "clinifed_version": "1 2"},
            {**WORDS, "clinifed_version": "١"},
        ],
    )
    def test_another_form_does_not_leave(self, site, words):
        with pytest.raises(PrivacyError, match="a handshake holds contract_sha256, clinifed_version"):
            leave(site, handshake(words))

    def test_with_something_beside_it_it_does_not_leave(self, site):
        with pytest.raises(PrivacyError, match="neither an update nor a handshake"):
            leave(site, handshake(WORDS, more="MILLER^ANNA"))

    def test_a_bare_ok_leaves_empty(self, site):
        reply = make_reply(ReturnCode.OK)
        reply.set_header("path", "/data/MILLER^ANNA")
        assert dict(leave(site, reply)) == {ReservedHeaderKey.HEADERS: {ReservedHeaderKey.RC: ReturnCode.OK}}

"""The FLARE executor: the run is the ledger's job, whatever FLARE calls its own; nothing is told but what may leave."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.decomposers import common_decomposers
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.lighter.utils import load_private_key_file, sign_folders

from clinifed import __version__
from clinifed.errors import PrivacyError
from clinifed.executors.filters import ReleaseFilter
from clinifed.executors.flare import SIMULATOR, SiteExecutor, _coordinator
from clinifed.executors.release import Releases
from clinifed.files import read_lines
from clinifed.jobs.provision import provision
from clinifed.messages import TASK_FINISH, TASK_HANDSHAKE
from clinifed.policy import POLICY_FOLDER
from clinifed.privacy.ledger import Ledger

COORDINATOR = "coordinator@consortium.org"


@pytest.fixture(autouse=True)
def logs_stay(monkeypatch):
    monkeypatch.setattr("clinifed.executors.flare.is_log_streaming_allowed", lambda fl_ctx: False)
    common_decomposers.register()  # as FLARE does when it starts


@pytest.fixture(scope="session")
def kits(federation, tmp_path_factory):
    """Certificates of one root: the server's, a site's, the coordinator's."""
    return provision(federation, tmp_path_factory.mktemp("kits") / "kits", lambda text: None)


def sign(app: Path, kit: Path) -> None:
    """Sign a job's app folder as FLARE does when it is submitted with ``kit``."""
    base = "server" if (kit / "startup" / "server.key").exists() else "client"
    sign_folders(
        str(app), load_private_key_file(str(kit / "startup" / f"{base}.key")), str(kit / "startup" / f"{base}.crt")
    )


@pytest.fixture
def app(tmp_path, kits) -> Path:
    """What FLARE deployed of a job: signed with the coordinator's kit."""
    app = tmp_path / "app"
    (app / "config").mkdir(parents=True)
    (app / "config" / "config_fed_client.json").write_text("{}")
    sign(app, kits[COORDINATOR])
    return app


@pytest.fixture
def site(contract, policy, tmp_path, app, kits):
    """A site that approves the contract, and executors of it, each the one of a FLARE job."""
    local, made = tmp_path / "local", []
    (local / POLICY_FOLDER).mkdir(parents=True)
    mine = policy.model_copy(update={"approved_contracts": (contract.sha256(),), "coordinators": (COORDINATOR,)})

    def save(changed):
        (local / POLICY_FOLDER / "alder.yaml").write_text(yaml.safe_dump(changed.model_dump(mode="json")))

    def context(**meta) -> FLContext:
        fl_ctx = FLContext()
        workspace = SimpleNamespace(
            get_site_config_dir=lambda: str(local),
            get_app_dir=lambda job: str(app),
            get_file_path_in_startup=lambda name: str(kits["alder"] / "startup" / name),
        )
        scope = SimpleNamespace(task_result_filters={"out": [ReleaseFilter()], "in": []})
        for key, value in {
            ReservedKey.IDENTITY_NAME: "alder",
            ReservedKey.ENGINE: SimpleNamespace(get_workspace=lambda: workspace),
            FLContextKey.SCOPE_OBJECT: scope,
            FLContextKey.JOB_META: {JobMetaKey.SUBMITTER_NAME.value: COORDINATOR, **meta},
        }.items():
            fl_ctx.set_prop(key, value, private=True)
        return fl_ctx

    def executor(run="run", agreed=contract) -> SiteExecutor:
        made.append(SiteExecutor(agreed.text(), run))
        return made[-1]

    save(mine)
    yield SimpleNamespace(policy=mine, save=save, context=context, executor=executor)
    for one in made:
        one.handle_event(EventType.END_RUN, context())


def ask(site, executor, task, data=None, aborted=False, **meta) -> Shareable:
    stop = Signal()
    if aborted:
        stop.trigger(True)
    return executor.execute(task, data or Shareable(), site.context(**meta), stop)


def round_of(contract, number) -> Shareable:
    params = {name: np.zeros(shape, np.float32) for name, shape in contract.shapes.items()}
    return FLModelUtils.to_shareable(FLModel(params_type=ParamsType.FULL, params=params, current_round=number))


def test_a_handshake_with_another_base_model_tells_the_sites_own_and_trains_nothing(site, contract):
    other = contract.base_model.model_copy(update={"sha256": "f" * 64})
    agreed = contract.model_copy(update={"base_model": other})
    site.save(site.policy.model_copy(update={"approved_contracts": (agreed.sha256(),)}))
    reply = ask(site, site.executor(agreed=agreed), TASK_HANDSHAKE)
    assert reply.get_return_code() == ReturnCode.OK
    assert reply[TASK_HANDSHAKE]["base_model_sha256"] == contract.base_model.sha256
    assert Ledger.of(site.policy).account().jobs == {}
    assert not site.policy.cache.exists()


def test_the_run_is_the_ledgers_job_in_every_flare_job_and_its_releases_stay_the_same(site, contract):
    words = {
        "contract_sha256": contract.sha256(),
        "clinifed_version": __version__,
        "base_model_sha256": contract.base_model.sha256,
    }
    sent = []
    for number in (0, 1):
        executor = site.executor("the-run")
        executor.handle_event(EventType.START_RUN, site.context(job_id=f"flare-{number}"))
        hello = ReleaseFilter().process(ask(site, executor, TASK_HANDSHAKE), site.context())
        assert hello[TASK_HANDSHAKE] == words
        for asked in range(number + 1):  # the second job asks for round 0 again
            reply = ask(site, executor, "train", round_of(contract, asked))
            sent.append(FLModelUtils.from_shareable(ReleaseFilter().process(reply, site.context())))
        executor.handle_event(EventType.END_RUN, site.context())
    assert [update.meta["job"] for update in sent] == ["the-run"] * 3
    assert sent[0].meta == sent[1].meta != sent[2].meta
    assert all((sent[0].params[name] == sent[1].params[name]).all() for name in contract.shapes)
    assert list(Ledger.of(site.policy).account().jobs) == ["the-run"]
    kinds = [record["kind"] for record in read_lines(site.policy.ledger)]
    assert (kinds.count("reserve"), kinds.count("charge")) == (1, 2)
    assert [entry["round"] for entry in read_lines(site.policy.diary)] == [0, 0, 1]


def test_the_end_of_a_job_keeps_the_reservation_and_the_end_of_the_run_returns_its_own(site, contract, prepared):
    Releases(contract, site.policy, "run").reserve(prepared.sites["alder"])
    held = Ledger.of(site.policy).state().reserved_units
    site.executor().handle_event(EventType.END_RUN, site.context())
    ask(site, site.executor("another"), TASK_FINISH)
    assert held == Ledger.of(site.policy).state().reserved_units > 0
    reply = ask(site, site.executor(), TASK_FINISH)
    assert dict(reply) == {ReservedHeaderKey.HEADERS: {ReservedHeaderKey.RC: ReturnCode.OK}}
    assert Ledger.of(site.policy).state().reserved_units == 0
    assert dict(ReleaseFilter().process(reply, site.context())) == dict(reply)


def test_a_trainer_that_is_killed_costs_the_site_no_round(site, contract):
    executor = site.executor()
    executor.handle_event(EventType.START_RUN, site.context())
    assert executor._trainer is not None
    os.kill(executor._trainer._process.pid, signal.SIGKILL)
    reply = ask(site, executor, "train", round_of(contract, 0))
    assert reply.get_return_code() == ReturnCode.OK
    assert [r["kind"] for r in read_lines(site.policy.ledger)].count("charge") == 1


def test_a_policy_that_was_changed_counts_from_the_next_task_on(site, contract):
    site.save(site.policy.model_copy(update={"approved_contracts": ()}))
    executor = site.executor()
    assert ask(site, executor, TASK_HANDSHAKE).get_return_code() == ReturnCode.TASK_UNSUPPORTED
    site.save(site.policy)  # the steward approves
    assert ask(site, executor, "train", round_of(contract, 0)).get_return_code() == ReturnCode.OK


@pytest.mark.parametrize("task", ["train", TASK_HANDSHAKE, TASK_FINISH])
def test_a_refusal_leaves_as_a_return_code_only(site, contract, task, monkeypatch):
    monkeypatch.setattr("clinifed.executors.flare.is_log_streaming_allowed", lambda fl_ctx: True)
    reply = ask(site, site.executor(), task, round_of(contract, 0))
    assert dict(reply) == {ReservedHeaderKey.HEADERS: {ReservedHeaderKey.RC: ReturnCode.TASK_UNSUPPORTED}}
    assert Ledger.of(site.policy).account().jobs == {}


def test_the_coordinator_is_whose_signature_the_job_bears_and_in_the_simulator_nobody_else(site):
    assert _coordinator(site.context()) == COORDINATOR
    nobody = site.context()
    nobody.set_prop(FLContextKey.SIMULATE_MODE, True, private=True)
    assert _coordinator(nobody) == SIMULATOR


def test_the_servers_word_on_who_submitted_is_not_enough(site, app, kits):
    with pytest.raises(PrivacyError, match="mallory"):
        _coordinator(site.context(**{JobMetaKey.SUBMITTER_NAME.value: "mallory@x.org"}))
    for signer in ("server", "alder"):  # their certificates are of the same root, and have no role
        sign(app, kits[signer])
        for said in (COORDINATOR, signer, str(kits[signer].name)):
            with pytest.raises(PrivacyError, match="coordinator's kit"):
                _coordinator(site.context(**{JobMetaKey.SUBMITTER_NAME.value: said}))


@pytest.mark.parametrize("change", ["unsigned", "altered", "added"])
def test_a_job_that_is_not_signed_as_it_stands_is_nobodys(site, app, change):
    if change == "unsigned":
        (app / ".__nvfl_sig.json").unlink()
    elif change == "altered":
        (app / "config" / "config_fed_client.json").write_text('{"executors": []}')
    else:
        (app / "custom").mkdir()
    with pytest.raises(PrivacyError, match="nobody"):
        _coordinator(site.context())


def test_what_is_no_contract_costs_no_more_than_an_answer(site):
    executor = SiteExecutor("{", "run")
    executor.handle_event(EventType.START_RUN, site.context())
    reply = ask(site, executor, TASK_HANDSHAKE)
    assert dict(reply) == {ReservedHeaderKey.HEADERS: {ReservedHeaderKey.RC: ReturnCode.EXECUTION_RESULT_ERROR}}


def test_an_aborted_round_ends_the_trainer_and_says_so(site, contract):
    executor = site.executor()
    reply = ask(site, executor, "train", round_of(contract, 0), aborted=True)
    assert reply.get_return_code() == ReturnCode.TASK_ABORTED
    assert executor._trainer is not None
    assert not executor._trainer.alive

"""What a site does with a job that a hostile or careless server hands on: FLARE's own deployment, in our kit."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvflare.apis.fl_constant import SiteType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.workspace import Workspace
from nvflare.fuel.sec.authz import AuthorizationService
from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
from nvflare.lighter.utils import load_private_key_file, sign_folders, verify_folder_signature_and_get_signers
from nvflare.private.admin_defs import Message, MsgHeader, ReturnCode
from nvflare.private.defs import RequestHeader, TrainingTopic
from nvflare.private.fed.app.default_app_validator import DefaultAppValidator
from nvflare.private.fed.app.fl_conf import create_privacy_manager
from nvflare.private.fed.client.client_engine import ClientEngine
from nvflare.private.fed.client.training_cmds import DeployProcessor
from nvflare.private.fed.utils.app_authz import AppAuthzService
from nvflare.private.privacy_manager import PrivacyService
from nvflare.security.security import FLAuthorizer

from clinifed.jobs.kit import COORDINATOR_ROLE, SERVER
from clinifed.jobs.provision import provision
from clinifed.jobs.recipe import FederationRecipe

from .federation import LiveFederation, make_federation

pytestmark = pytest.mark.faults

SITE, JOB = "cedar", "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> LiveFederation:
    """A federation on the disk; none of it is started."""
    return make_federation(tmp_path_factory.mktemp("door"))


class Door:
    """A site's parent process as far as it takes a job in: FLARE's processor, deployer, validator and authorizer."""

    def __init__(self, kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kit = kit
        workspace = Workspace(root_dir=str(kit), site_name=SITE)
        policy = json.loads((kit / "local" / "authorization.json").read_text())
        monkeypatch.setattr(AuthorizationService, "the_authorizer", FLAuthorizer(SITE, policy))
        monkeypatch.setattr(AppAuthzService, "app_validator", DefaultAppValidator(SiteType.CLIENT))
        monkeypatch.setattr(PrivacyService, "manager", create_privacy_manager(workspace, names_only=True))
        self.engine = ClientEngine.__new__(ClientEngine)  # its constructor wants a connected client
        self.engine.args = SimpleNamespace(workspace=str(kit))
        self.engine.client_name, self.engine.new_context = SITE, FLContext
        monkeypatch.setattr(self.engine, "get_component", lambda name: None, raising=False)
        monkeypatch.setattr(self.engine, "get_client_name", lambda: SITE, raising=False)

    def deploy(self, app: bytes, submitter: str, **meta: object) -> str:
        """Empty when the job was taken in, else the site's answer."""
        request = Message(TrainingTopic.DEPLOY, app)
        request.set_header(RequestHeader.JOB_ID, JOB)
        request.set_header(RequestHeader.APP_NAME, "app")
        told = {"submitter_name": submitter, "submitter_org": "consortium", "submitter_role": COORDINATOR_ROLE, **meta}
        request.set_header(RequestHeader.JOB_META, told)
        reply = DeployProcessor().process(request, self.engine)
        return "" if reply.get_header(MsgHeader.RETURN_CODE) == ReturnCode.OK else str(reply.body)

    @property
    def deployed(self) -> bool:
        return (self.kit / JOB).exists()


@pytest.fixture
def door(made: LiveFederation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    yield Door(made.paths[SITE], monkeypatch)
    shutil.rmtree(made.paths[SITE] / JOB, ignore_errors=True)


@pytest.fixture
def app(made: LiveFederation, tmp_path: Path) -> Path:
    """The application of an honest job, unsigned."""
    contract = made.contract(made.federation())
    FederationRecipe(contract).write(tmp_path / "job")
    return tmp_path / "job" / contract.federation / "app"


def sign(app: Path, kit: Path, base: str = "client") -> None:
    sign_folders(
        str(app), load_private_key_file(str(kit / "startup" / f"{base}.key")), str(kit / "startup" / f"{base}.crt")
    )


def packed(app: Path) -> bytes:
    return bytes(zip_directory_to_bytes(str(app), ""))


def test_the_coordinators_signed_job_is_taken_in(made: LiveFederation, door: Door, app: Path) -> None:
    sign(app, made.admin)
    assert door.deploy(packed(app), made.admin.name) == ""
    assert door.deployed


def unsigned(app: Path, made: LiveFederation) -> None:
    """As it is."""


def changed(app: Path, made: LiveFederation) -> None:
    sign(app, made.admin)
    path = app / "config" / "config_fed_client.json"
    path.write_text(path.read_text().replace("epsilon", "epsilom"))


def file_added(app: Path, made: LiveFederation) -> None:
    sign(app, made.admin)
    (app / "config" / "more.json").write_text("{}")


def folder_added(app: Path, made: LiveFederation) -> None:
    """With the signatures of another folder of the same job."""
    sign(app, made.admin)
    shutil.copytree(app / "config", app / "custom")


def signature_removed(app: Path, made: LiveFederation) -> None:
    sign(app, made.admin)
    for path in app.glob("**/.__nvfl*"):
        path.unlink()


def of_a_foreign_root(app: Path, made: LiveFederation) -> None:
    """The same federation, provisioned by somebody else: the same names, another root."""
    other = app.parents[2] / "other"
    sign(app, provision(made.federation(), other, lambda text: None)[made.admin.name])


SIGNATURES = (unsigned, signature_removed, changed, file_added, folder_added, of_a_foreign_root)


@pytest.mark.parametrize("spoil", SIGNATURES, ids=lambda f: f.__name__.replace("_", " "))
def test_a_job_that_no_coordinator_signed_is_not_taken_in(
    spoil: Callable[[Path, LiveFederation], None], made: LiveFederation, door: Door, app: Path
) -> None:
    spoil(app, made)
    assert "sign" in door.deploy(packed(app), made.admin.name)
    assert not door.deployed


@pytest.mark.parametrize(("who", "base"), [(SERVER, "server"), ("birch", "client")])
def test_flare_takes_any_certificate_of_the_federation_for_a_coordinators(
    who: str, base: str, made: LiveFederation, door: Door, app: Path
) -> None:
    """It believes the server who submitted. Whose signature it is, only the deployed folder says."""
    sign(app, made.paths[who], base)
    assert door.deploy(packed(app), made.admin.name) == ""
    meta = json.loads((door.kit / JOB / "meta.json").read_text())
    assert meta["submitter_name"] == made.admin.name
    root = str(door.kit / "startup" / "rootCA.pem")
    verified, signers = verify_folder_signature_and_get_signers(str(door.kit / JOB / f"app_{SITE}"), root)
    assert verified
    assert [(name, role) for name, _, role in signers] == [(who, "")], "a coordinator's certificate names its role"


def test_a_coordinators_job_with_code_of_its_own_is_not_taken_in(made: LiveFederation, door: Door, app: Path) -> None:
    (app / "custom").mkdir()
    (app / "custom" / "brought.py").write_text("raise SystemExit\n")
    sign(app, made.admin)
    assert "BYOC not permitted" in door.deploy(packed(app), made.admin.name)
    assert not door.deployed


def test_a_job_that_wants_another_privacy_scope_is_not_taken_in(made: LiveFederation, door: Door, app: Path) -> None:
    """One without our filter, say; a job names its scope, and the site has one."""
    sign(app, made.admin)
    assert "scope" in door.deploy(packed(app), made.admin.name, scope="public")
    assert not door.deployed


def escaping(name: str) -> bytes:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "{}")
    return stream.getvalue()


@pytest.mark.parametrize("name", ["../../local/clinifed/cedar.yaml", "/etc/passwd", "config/../../../x"])
def test_an_archive_that_leaves_its_folder_is_not_taken_in(name: str, made: LiveFederation, door: Door) -> None:
    policy = (door.kit / "local" / "clinifed" / f"{SITE}.yaml").read_bytes()
    assert "failed to stage" in door.deploy(escaping(name), made.admin.name)
    assert not door.deployed
    assert (door.kit / "local" / "clinifed" / f"{SITE}.yaml").read_bytes() == policy

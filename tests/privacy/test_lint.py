"""The linter: every rule catches the defect it is for, and what clinifed itself writes is clean."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinifed.config import Federation
from clinifed.contract import Contract
from clinifed.errors import ConfigError
from clinifed.jobs.prepare import write_site_folder
from clinifed.jobs.recipe import FederationRecipe, build_contract
from clinifed.models.backbone import load_backbone
from clinifed.policy import JOB_CLASSES, Budget, SitePolicy
from clinifed.privacy.accountant import noise_multiplier_for
from clinifed.privacy.lint import LINT_RULES, Finding, lint

CONFIGS = Path(__file__).parents[2] / "simulator_configs"
DELTA = 1e-5
NAME = "unit"
FEDERATION: dict[str, Any] = {
    "name": NAME,
    "rounds": 5,
    "min_clients": 1,
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "max_clients": 2,
    "training": {"local_epochs": 2},
    "privacy": {"reserve_rounds": 1},
    "data": {"synthesize": {"patients_per_specialty": 30}},
    "sites": {"alder": {"specialties": ["radiology"]}, "birch": {"specialties": ["radiology"]}},
}


@pytest.fixture(scope="module")
def contract() -> Contract:
    return build_contract(Federation.model_validate(FEDERATION), load_backbone("tiny"))


def federation(**changes: Any) -> str:
    """A good federation's YAML, with dotted keys set in it."""
    content = json.loads(json.dumps(FEDERATION))
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = content
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return yaml.safe_dump(content)


def client(args: dict[str, Any], path: str = "clinifed.executors.flare.SiteExecutor", **more: Any) -> str:
    return json.dumps({"executors": [{"tasks": ["train"], "executor": {"path": path, "args": args}}], **more})


def server(path: str, **args: Any) -> str:
    return json.dumps({"workflows": [{"id": "w", "path": path, "args": args}]})


def scopes(*filters: dict[str, Any], default: str | None = "hospital") -> str:
    return json.dumps({"scopes": [{"name": "hospital", "task_result_filters": filters}], "default_scope": default})


def promise(releases: int = 12, sigma: float | None = None, **more: Any) -> str:
    sigma = noise_multiplier_for(1.0, DELTA, 12) if sigma is None else sigma
    terms = {"epsilon": 1.0, "delta": DELTA, "noise_multiplier": sigma, "releases": releases, "reserve_rounds": 1}
    return json.dumps({"rounds": 5, "training": {"local_epochs": 2}, "promise": {**terms, **more}})


RELEASE = {"path": "clinifed.executors.filters.ReleaseFilter", "args": {}, "direction": "out"}
PERCENTILE = {"path": "nvflare.app_common.filters.percentile_privacy.PercentilePrivacy", "args": {"gamma": 0}}
SVT = {"path": "nvflare.app_common.filters.svt_privacy.SVTPrivacy", "args": {}}
F, C, CLIENT, SERVER, META = "f.yaml", "contract.json", "config_fed_client.json", "config_fed_server.json", "meta.json"
CODE = "job/custom/client.py"

# rule → (file, content) of one defect each, as found in other projects
BAD: dict[str, list[tuple[str, str]]] = {
    "accountant-per-round": [
        (F, federation(privacy__accountant_scope="round")),
        (F, federation(privacy__epsilon_per_round=1.0)),
        (F, federation(privacy__budget={"reset": "START_RUN", "reset_budget": True})),
        (C, promise(sigma=noise_multiplier_for(1.0, DELTA, 2))),
        ("privacy.json", scopes(SVT, RELEASE)),
    ],
    "calibration-per-round": [
        (CODE, "model, optimizer, loader = engine.make_private_with_epsilon(module=model, target_epsilon=1.0)\n"),
        (F, federation(privacy__calibrate="every_round")),
    ],
    "step-count": [
        (C, promise(releases=5)),
        ("flat.yaml", yaml.safe_dump({"num_rounds": 15, "num_updates": 100, "steps": 15})),
    ],
    "noise-multiplier": [
        (C, promise(sigma=noise_multiplier_for(1.0, DELTA, 11))),
        (C, promise(sigma=0.0)),
        ("flat.yaml", yaml.safe_dump({"target_epsilon": 3, "delta": DELTA, "sigma": 1.0, "num_rounds": 50})),
    ],
    "sensitivity": [
        (CLIENT, client({"clip_norm": 1.0, "sensitivity": 1e-4, "epsilon": 10})),
        ("flat.yaml", "sensitivity: 0.5\n"),
        ("flat.yaml", yaml.safe_dump({"dp_args": {"type": "central", "sigma": 0.4, "clip": 0.005}})),
    ],
    "filter-fails-open": [
        ("privacy.json", scopes()),
        ("privacy.json", scopes(RELEASE, default=None)),
        ("privacy.json", scopes({**RELEASE, "direction": "in"})),
        ("privacy.json", scopes(RELEASE, {"path": "some.Filter", "args": {}})),
        ("privacy.json", scopes(PERCENTILE, RELEASE)),
        ("flat.yaml", "filter: {fail_open: true}\n"),
        ("flat.yaml", "filter: {on_error: continue}\n"),
        ("local/clinifed/alder.yaml", yaml.safe_dump({"site": "alder", "ledger": "l", "budget": {"epsilon": 1}})),
    ],
    "job-filters": [
        (CLIENT, client({}, task_result_filters=[{"tasks": ["train"], "filters": [PERCENTILE]}])),
        (CLIENT, client({}, task_data_filters=[{"tasks": ["train"], "filters": [{"name": "X"}]}])),
    ],
    "allow-list": [
        ("resources.json", json.dumps({"class_allow_list": ["clinifed."]})),
        ("resources.json", json.dumps({"class_allow_list": [*JOB_CLASSES["site"], "nvflare."]})),
        ("resources.json", json.dumps({"format_version": 2})),
        (
            "resources.json",
            json.dumps({"class_allow_list": JOB_CLASSES["site"], "class_list_enforcement_mode": "warn"}),
        ),
    ],
    "log-streaming": [
        ("resources.json", json.dumps({"class_allow_list": JOB_CLASSES["site"]})),
        ("resources.json", json.dumps({"class_allow_list": JOB_CLASSES["site"], "allow_log_streaming": True})),
    ],
    "server-decides": [
        (CLIENT, client({"target_epsilon": 1.0})),
        (CLIENT, client({"task_script_args": "--batch_size 64 --target_epsilon=1.0"})),
        (META, json.dumps({"deploy_map": {"app": ["@ALL"]}, "privacy_budget": 3})),
        (C, promise(cost=7)),
        (F, federation(privacy__epsilon_source="server")),
        (F, federation(privacy__accountant="prv")),
    ],
    "late-join": [
        (F, federation(privacy__dp_start_round=2)),
        (F, federation(privacy__warmup_rounds=3)),
        (CLIENT, client({"engine_init_round": 0})),
        (CODE, "if model.current_round == 0:\n    engine = PrivacyEngine()\n"),
    ],
    "private-statistics": [
        (CODE, "from sklearn.preprocessing import StandardScaler\n"),
        (F, federation(data__normalise="site")),
        ("flat.yaml", "preprocess: {class: sklearn.preprocessing.MinMaxScaler}\n"),
        ("flat.yaml", "transforms: {fit_on: train, class_weights: balanced}\n"),
    ],
    "private-selection": [
        (SERVER, server("nvflare.app_common.widgets.intime_model_selector.IntimeModelSelector", key_metric="accuracy")),
        (F, federation(training__early_stopping={"patience": 3})),
        (F, federation(aggregation__select_best_by="local_val_accuracy")),
        (CLIENT, client({"stop_cond": "accuracy >= 80"})),
    ],
    "sampling": [
        (F, federation(training__shuffle=True)),
        (F, federation(privacy__sample_rate=0.1)),
        (F, federation(privacy__poisson_sampling=True)),
        (CODE, "loader = DataLoader(data, batch_size=8, shuffle=True)\n"),
    ],
    "rand-on-empty": [
        (F, federation(privacy__rand_on_empty=True)),
        ("flat.yaml", "empty_batch: skip\n"),
    ],
    "secure-mode": [
        (F, federation(privacy__secure_mode=True)),
        (CODE, "engine = PrivacyEngine(secure_mode=False)\n"),
    ],
    "noise-seed": [
        (F, federation(privacy__noise_seed=0)),
        (F, federation(privacy__noise_generator="torch")),
        (CLIENT, client({"seed": 1})),
        (CODE, "torch.manual_seed(round_number)\n"),
    ],
    "batch-coupled": [
        (F, federation(privacy__objective="infonce")),
        (F, federation(privacy__objective="in-batch-siglip")),
        ("flat.yaml", "loss: open_clip.loss.ClipLoss\n"),
        ("flat.yaml", "model: {norm_layer: BatchNorm2d}\n"),
    ],
    "custom-code": [
        (META, json.dumps({"deploy_map": {"app": ["@ALL"]}, "byoc": True})),
        (CLIENT, client({"task_script_path": "client.py"})),
        (CLIENT, client({}, path="nvflare.app_opt.pt.client_api_launcher_executor.PTClientAPILauncherExecutor")),
        (CODE, "print()\n"),
        ("job/custom/weights.pt", "anything"),
    ],
    "private-counts": [
        (SERVER, server("nvflare.app_common.workflows.fedavg.FedAvg", num_rounds=5)),
        (F, federation(aggregation__weights="num_samples")),
        (F, federation(privacy__expected_batch_size=64)),
        (CODE, "model = FLModel(params=p, meta={'NUM_STEPS_CURRENT_ROUND': steps})\n"),
    ],
    "unnoised-metrics": [
        (SERVER, server("nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver")),
        (CODE, "model = FLModel(params=p, metrics={'accuracy': a})\n"),
        (CLIENT, client({"train_with_evaluation": True})),
    ],
    "schema": [
        (F, federation(roundz=3)),
        (F, federation(min_clients=3)),
        (C, promise()),
        ("local/clinifed/alder.yaml", yaml.safe_dump({"site": "alder", "ledger": "l", "budget": {"epsilon": -1}})),
    ],
}


def write(folder: Path, file: str, content: str) -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def rules(findings: list[Finding]) -> set[str]:
    return {finding.rule for finding in findings}


@pytest.mark.parametrize("rule", LINT_RULES)
def test_every_rule_catches_its_defects(rule: str, tmp_path: Path) -> None:
    assert BAD[rule]
    for index, (file, content) in enumerate(BAD[rule]):
        folder = tmp_path / str(index)
        write(folder, file, content)
        caught = [f for f in lint(folder) if f.rule == rule]
        assert caught, (file, content)
        assert all(str(folder / file) in f.where and f.found and f.why and f.remedy for f in caught)


def test_every_fixture_belongs_to_a_rule() -> None:
    assert set(BAD) == set(LINT_RULES)


def test_a_finding_names_file_key_and_value(tmp_path: Path) -> None:
    write(tmp_path, F, federation(privacy__rand_on_empty=True))
    found = {f.rule: f for f in lint(tmp_path / F)}
    assert set(found) == {"rand-on-empty", "schema"}
    assert found["rand-on-empty"].where == f"{tmp_path / F}:privacy.rand_on_empty"
    assert found["rand-on-empty"].found == "rand_on_empty: True"
    assert found["schema"].where == f"{tmp_path / F}:privacy.rand_on_empty"
    assert "unknown key" in found["schema"].found


def test_what_is_switched_off_is_no_finding(tmp_path: Path) -> None:
    write(
        tmp_path, "flat.yaml", "shuffle: false\nrand_on_empty: no\npatience: 0\ndp_start_round: 0\nsample_rate: 1.0\n"
    )
    write(tmp_path, "equal.yaml", "args: {clip_norm: 1.0, sensitivity: 1}\nselect_on: public_validation\n")
    assert lint(tmp_path) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_configurations_are_clean(path: Path) -> None:
    assert lint(path) == []


def test_the_shipped_configurations_are_clean_as_a_folder() -> None:
    assert len(list(CONFIGS.glob("*.yaml"))) >= 4
    assert lint(CONFIGS) == []


def test_a_job_of_ours_is_clean_and_its_contracts_are_checked(contract: Contract, tmp_path: Path) -> None:
    FederationRecipe(contract).write(tmp_path)
    assert lint(tmp_path) == []
    path = tmp_path / NAME / "app" / "config" / "config_fed_client.json"
    job = json.loads(path.read_text())
    arguments = job["executors"][0]["executor"]["args"]
    weak = json.loads(arguments["contract"])
    weak["promise"]["noise_multiplier"] /= 2
    arguments["contract"] = json.dumps(weak)
    path.write_text(json.dumps(job))
    (finding,) = [f for f in lint(tmp_path) if f.rule == "noise-multiplier"]
    assert finding.where == f"{path}:executors[0].executor.args.contract.promise.noise_multiplier"


def policy(home: Path, contract: Contract) -> SitePolicy:
    return SitePolicy(
        site="alder",
        manifest=home / "manifest.csv",
        ledger=home / "jobs" / "ledger.jsonl",
        signing_key=home / "signing.key",
        cache=home / "cache",
        diary=home / "diary.jsonl",
        budget=Budget(epsilon=1.0, delta=DELTA),
        approved_contracts=(contract.sha256(),),
        coordinators=("simulator",),
        declare=("patient_count", "train_loss"),
    )


def test_a_site_folder_of_ours_is_clean_and_needs_its_privacy_scope(contract: Contract, tmp_path: Path) -> None:
    local = tmp_path / "local"
    write_site_folder(local, {"alder": policy(tmp_path, contract)}, contract)
    assert lint(local) == []
    (local / "privacy.json").rename(local / "privacy.json.sample")  # which FLARE does not read
    (finding,) = lint(local)
    assert finding.rule == "filter-fails-open"
    assert finding.where == str(local / "clinifed" / "alder.yaml")


def test_with_privacy_off_there_is_no_noise_to_check(tmp_path: Path) -> None:
    off = {**FEDERATION, "privacy": "off", "aggregation": {**FEDERATION["aggregation"], "norm_bound": 1.0}}
    agreed = build_contract(Federation.model_validate(off), load_backbone("tiny"))
    FederationRecipe(agreed).write(tmp_path)
    assert lint(tmp_path) == []


def test_names_that_people_choose_are_no_settings(tmp_path: Path) -> None:
    labels = {"patience": ["a photo"], "shuffle": ["ClipLoss"]}
    changes = {"specialties": {"sampler": {"labels": labels}}, "sites": {"patience": {"specialties": ["sampler"]}}}
    write(tmp_path, F, federation(**changes))
    assert lint(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("bad.yaml", "a: [", "not valid"),
        ("bad.json", "{", "not valid"),
        ("twice.json", '{"epsilon": 1, "epsilon": 8}', "epsilon stands there twice"),
        ("endless.yaml", "a: &a [*a]\n", "nested without end"),
        ("config_fed_client.conf", "executors = []", "HOCON"),
        ("job/custom/client.py", "def (", "not valid"),
    ],
)
def test_what_cannot_be_read_is_an_error_and_not_a_clean_bill(
    file: str, content: str, says: str, tmp_path: Path
) -> None:
    write(tmp_path, file, content)
    with pytest.raises(ConfigError, match=says) as refused:
        lint(tmp_path)
    assert str(tmp_path / file) in refused.value.problems[0]


def test_all_unreadable_files_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, "a.json", "{")
    write(tmp_path, "b.yaml", "a: [")
    with pytest.raises(ConfigError) as refused:
        lint(tmp_path)
    assert len(refused.value.problems) == 2


def test_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not there"):
        lint(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="no YAML or JSON"):
        lint(tmp_path)


WORDS = (
    "scopes default_scope task_result_filters executors executor path args workflows promise rounds sites privacy name "
    "releases epsilon delta noise_multiplier sensitivity clip class_allow_list training local_epochs data site ledger "
    "budget manifest mode type sample_rate"
)
KEYS = st.sampled_from(re.findall(r"\w+", WORDS))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 60), st.floats(), st.sampled_from(["dp", "--a", "x.Y", "'"])
)
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(KEYS, ANYTHING, max_size=8), file=st.sampled_from(["a.json", "privacy.json", CLIENT]))
def test_no_content_takes_the_linter_down(content: dict[str, Any], file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_text(json.dumps(content))
    for finding in lint(path):
        assert finding.rule in LINT_RULES

"""The JobSet and the image for Kubernetes: known fields, consistent numbers, and what happens after each exit code."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import PODS, ROOT

from research.cli.arguments import unknown_option
from research.cli.experiment import load_experiment
from research.cli.options import Options
from research.training import signals

# What the fields are called, of JobSet v1alpha2 (api/jobset/v1alpha2/jobset_types.go) and of Kubernetes 1.34; None: anything.
POD = {
    "activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy hostNetwork hostname imagePullSecrets "
    "initContainers nodeName nodeSelector priorityClassName restartPolicy runtimeClassName schedulerName securityContext "
    "serviceAccountName subdomain terminationGracePeriodSeconds tolerations": None,
    "containers": {
        "args command env envFrom image imagePullPolicy lifecycle livenessProbe name readinessProbe securityContext startupProbe "
        "workingDir": None,
        "ports": {"containerPort hostIP hostPort name protocol": None},
        "resources": {"claims limits requests": None},
        "volumeMounts": {"mountPath mountPropagation name readOnly recursiveReadOnly subPath subPathExpr": None},
    },
    "volumes": {
        "name configMap csi emptyDir ephemeral hostPath nfs projected secret": None,
        "persistentVolumeClaim": {"claimName readOnly": None},
    },
}
JOB = {
    "activeDeadlineSeconds backoffLimit backoffLimitPerIndex completionMode completions managedBy manualSelector "
    "maxFailedIndexes parallelism podReplacementPolicy selector successPolicy suspend ttlSecondsAfterFinished": None,
    "podFailurePolicy": {
        "rules": {
            "action": None,
            "onExitCodes": {"containerName operator values": None},
            "onPodConditions": {"status type": None},
        }
    },
    "template": {"metadata": {"annotations labels": None}, "spec": POD},
}
JOBSET = {
    "apiVersion kind": None,
    "metadata": {"annotations labels name namespace": None},
    "spec": {
        "coordinator dependsOn managedBy startupPolicy successPolicy suspend ttlSecondsAfterFinished": None,
        "network": {"enableDNSHostnames publishNotReadyAddresses subdomain": None},
        "failurePolicy": {
            "maxRestarts restartStrategy": None,
            "rules": {"action name onJobFailureMessagePatterns onJobFailureReasons targetReplicatedJobs": None},
        },
        "replicatedJobs": {
            "name groupName replicas dependsOn": None,
            "template": {"metadata": {"annotations labels": None}, "spec": JOB},
        },
    },
}


def unknown(found: Any, schema: dict[str, Any] | None, where: str = "") -> list[str]:
    """Returns the fields that the schema does not have."""
    if schema is None:
        return []
    if isinstance(found, list):
        return [name for i, item in enumerate(found) for name in unknown(item, schema, f"{where}[{i}]")]
    fields = {name: below for names, below in schema.items() for name in names.split()}
    wrong = [f"{where}.{name}" for name in found if name not in fields]
    return wrong + [name for key, item in found.items() if key in fields for name in unknown(item, fields[key], f"{where}.{key}")]


@pytest.fixture(scope="module")
def jobset() -> dict[str, Any]:
    return yaml.safe_load((PODS / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def job(jobset: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.fixture(scope="module")
def container(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = job["template"]["spec"]["containers"]
    return found


def test_the_jobset_has_only_known_fields(jobset: dict[str, Any]) -> None:
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert unknown(jobset, JOBSET) == []


def test_hosts_and_chips_are_those_of_the_topology(job: dict[str, Any], container: dict[str, Any]) -> None:
    pod = job["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert job["completions"] == job["parallelism"]
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["completionMode"] == "Indexed"


def test_the_other_slices_in_its_table_add_up() -> None:
    rows = re.findall(r"^# .*? (tpu-\S+) +(\d+(?:x\d+)+) +(\d+) +(\d+)$", (PODS / "jobset.yaml").read_text(), re.MULTILINE)
    assert len(rows) == 5
    for _, topology, chips, hosts in rows:
        assert math.prod(map(int, topology.split("x"))) == int(chips) * int(hosts)


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (signals.RESUMABLE, False, "Ignore"),
        (signals.RESUMABLE, True, "Ignore"),
        (137, True, "Ignore"),
        (1, True, "Ignore"),
        (1, False, "FailJob"),
        (2, False, "FailJob"),
        (137, False, None),
        (134, False, None),
    ],
)
def test_the_action_for_each_way_in_which_a_pod_ends(
    job: dict[str, Any], container: dict[str, Any], code: int, disrupted: bool, action: str | None
) -> None:
    def matches(rule: dict[str, Any]) -> bool:
        if "onPodConditions" in rule:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            return disrupted
        assert rule["onExitCodes"]["operator"] == "In"
        assert rule["onExitCodes"]["containerName"] == container["name"]
        return code in rule["onExitCodes"]["values"]

    assert next((rule["action"] for rule in job["podFailurePolicy"]["rules"] if matches(rule)), None) == action


def test_a_death_restarts_all_hosts_and_a_failure_none(jobset: dict[str, Any], job: dict[str, Any]) -> None:
    policy = jobset["spec"]["failurePolicy"]
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    assert policy["maxRestarts"] > 0
    assert job["backoffLimit"] == 0  # a pod's death fails its job, and so restarts the set
    assert job["podReplacementPolicy"] == "Failed"  # the only one that goes with a podFailurePolicy
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # the same


def test_a_pod_has_time_to_save_and_sees_the_signal(job: dict[str, Any], container: dict[str, Any]) -> None:
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
    assert container["command"] == ["python", "-m", "research", "run"]  # no shell between SIGTERM and Python
    assert 'ENTRYPOINT ["python", "-m", "research", "run"]' in (PODS / "Dockerfile").read_text()


def test_pods_find_each_other_before_they_are_ready(jobset: dict[str, Any]) -> None:
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"] is True
    assert network["publishNotReadyAddresses"] is True
    assert network["subdomain"] == jobset["metadata"]["name"]


def test_the_run_directory_is_on_storage_that_all_hosts_share(job: dict[str, Any], container: dict[str, Any]) -> None:
    claim = yaml.safe_load((PODS / "storage.yaml").read_text())
    (mount,), (volume,) = container["volumeMounts"], job["template"]["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (run,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--run-dir=")]
    assert Path(run).parent == Path(mount["mountPath"])


def test_the_jobset_runs_an_existing_experiment_with_options_that_it_has(container: dict[str, Any]) -> None:
    name, *options = container["args"]
    module = load_experiment(name).module
    assert unknown_option(options, [*dataclasses.fields(module.Config), *dataclasses.fields(Options)]) is None


def test_every_file_that_the_image_copies_exists() -> None:
    copied = re.findall(r"^COPY (?!\. )(.*) \S+$", (PODS / "Dockerfile").read_text(), re.MULTILINE)
    assert len(copied) == 2
    assert not [name for line in copied for name in line.split() if not (ROOT / name).exists()]

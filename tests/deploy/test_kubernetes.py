"""The overlays as a cluster would get them: valid, restricted, and in step with the code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import kubernetes_validate
import pytest
import yaml

from service.app import create_app
from service.settings import ServiceSettings
from tests.deploy.conftest import OVERLAYS, ROOT, Document, accepted, kustomized, rendered, variables
from tests.present import present
from worker.probes import STALLED_S, Probes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORKLOADS = ("Deployment", "StatefulSet")
CUSTOM: dict[tuple[str, str], dict[str, set[str]]] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): {
        "": {"selector", "endpoints"},
        "endpoints": {"port", "interval"},
    },
    ("monitoring.coreos.com/v1", "PodMonitor"): {
        "": {"selector", "podMetricsEndpoints"},
        "podMetricsEndpoints": {"port", "interval"},
    },
    ("monitoring.coreos.com/v1", "PrometheusRule"): {"": {"groups"}, "groups": {"name", "rules"}},
    ("keda.sh/v1alpha1", "ScaledObject"): {
        "": {
            "scaleTargetRef",
            "minReplicaCount",
            "maxReplicaCount",
            "pollingInterval",
            "cooldownPeriod",
            "fallback",
            "advanced",
            "triggers",
        },
        "triggers": {"type", "metricType", "metadata"},
        "fallback": {"failureThreshold", "replicas"},
        "advanced": {"horizontalPodAutoscalerConfig"},
    },
}
"""The custom kinds in use, and those fields of their specs that we need, by where they stand."""
FOREIGN = {"HF_TOKEN", "HF_HOME", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
"""Environment of the hub's client and the object store's."""
Documents = tuple[Document, ...]


def workloads(documents: Documents) -> list[tuple[Document, Document]]:
    """Each Deployment and StatefulSet with its pod's spec; there are some."""
    found = [each for each in documents if each["kind"] in WORKLOADS]
    assert found
    return [(each, each["spec"]["template"]["spec"]) for each in found]


def containers(documents: Documents) -> Iterator[tuple[str, Document]]:
    """Every container, init containers included, with what its workload is called by label."""
    for document, pod in workloads(documents):
        name = document["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            yield name, container


def ours(documents: Documents, *names: str) -> list[tuple[str, Document]]:
    """The containers of front end and workers, or of those that are named: at least one of each."""
    wanted = set(names or ("service", "worker"))
    found = [(name, container) for name, container in containers(documents) if name in wanted]
    assert {name for name, _ in found} == wanted
    return found


def of_kind(documents: Documents, kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def matches(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a label selector takes a pod with `labels`."""
    expressions = (
        labels.get(each["key"]) in each["values"] and each["operator"] == "In"
        for each in selector.get("matchExpressions", ())
    )
    return selector.get("matchLabels", {}).items() <= labels.items() and all(expressions)


def pods(documents: Documents) -> list[Document]:
    """The templates of all pods."""
    return [document["spec"]["template"] for document, _ in workloads(documents)]


def environment(container: Document, documents: Documents) -> dict[str, str]:
    """What a container is told, without what a secret made by hand holds."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        for kind, reference in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            name = source.get(reference, {}).get("name")
            for each in of_kind(documents, kind):
                if each["metadata"]["name"] == name:
                    found |= dict.fromkeys(each["data"], "") if kind == "Secret" else each["data"]
    return found | {each["name"]: each["value"] for each in container.get("env", ())}


def test_every_document_is_what_kubernetes_takes(documents: Documents) -> None:
    """By its schemas; of the custom kinds, the fields that we know to be theirs."""
    for document in documents:
        fields = CUSTOM.get((document["apiVersion"], document["kind"]))
        if fields is None:
            kubernetes_validate.validate(document, "1.35", strict=True)
            continue
        for where, known in fields.items():
            found = document["spec"][where] if where else document["spec"]
            for each in found if isinstance(found, list) else [found]:
                assert each.keys() <= known


def test_names_are_unique_and_in_the_namespace(documents: Documents) -> None:
    """Nothing replaces anything else, and everything lies where the policies hold."""
    keys = [(each["kind"], each["metadata"]["name"]) for each in documents]
    assert len(keys) == len(set(keys))
    (namespace,) = of_kind(documents, "Namespace")
    others = {each["metadata"]["namespace"] for each in documents if each["kind"] != "Namespace"}
    assert others == {namespace["metadata"]["name"]}


def test_the_namespace_enforces_restricted_pods(documents: Documents) -> None:
    """Whatever is changed here later, the cluster refuses what is not restricted."""
    (namespace,) = of_kind(documents, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_no_pod_is_root_or_may_become_it(documents: Documents) -> None:
    """The restricted standard, and on top of it a numeric user and a file system that cannot be written."""
    for _, pod in workloads(documents):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert not any("hostPath" in volume for volume in pod.get("volumes", ()))
    for _, container in containers(documents):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_user_is_the_images_own(documents: Documents) -> None:
    """What the image gives to its user is what the pod's user may write."""
    user = next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("USER"))
    for document, pod in workloads(documents):
        if document["kind"] == "Deployment":
            context = pod["securityContext"]
            assert user == f"USER {context['runAsUser']}:{context['runAsGroup']}"
            assert context["fsGroup"] == context["runAsGroup"]


def test_every_container_has_requests_and_limits(documents: Documents) -> None:
    """CPU and memory, requests no higher than limits; scratch volumes have a size."""
    for _, container in containers(documents):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys()
        assert {"cpu", "memory"} <= resources["limits"].keys()
    for _, pod in workloads(documents):
        scratch = [volume["emptyDir"] for volume in pod.get("volumes", ()) if "emptyDir" in volume]
        assert all(each.get("sizeLimit") for each in scratch)


def test_images_are_pinned(documents: Documents) -> None:
    """No tag that means another image tomorrow."""
    for _, container in containers(documents):
        _, _, tag = container["image"].rpartition("/")[2].partition(":")
        assert tag
        assert tag != "latest"


def test_probes_ask_for_routes_and_ports_that_exist(documents: Documents) -> None:
    """The front end's are its own routes that need neither key nor broker; a worker's are its `Probes`."""
    application = create_app(ServiceSettings(media_url="memory:///", metrics_port=9100))
    routes = application.openapi()["paths"].keys() & {"/livez", "/readyz"}
    open_routes = {"service": routes, "worker": {"/livez", "/readyz"}}
    for name, container in containers(documents):
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if "httpGet" in container[probe]:
                assert container[probe]["httpGet"]["path"] in open_routes[name]
                assert container[probe]["httpGet"]["port"] in ports
        if name in open_routes:
            assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_a_worker_may_load_for_long_before_it_is_judged(documents: Documents) -> None:
    """Startup waits for the warm model; liveness then acts within minutes of what `Probes` finds."""
    for _, container in ours(documents, "worker"):
        startup, liveness = container["startupProbe"], container["livenessProbe"]
        assert startup["httpGet"]["path"] == "/readyz"
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
        assert STALLED_S + liveness["periodSeconds"] * liveness["failureThreshold"] <= 300
    assert isinstance(Probes.alive, property)


def test_the_ports_are_those_that_the_settings_open(documents: Documents) -> None:
    """Image and manifests name the same ports: the image's environment, its EXPOSE, and these."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name, container in ours(documents):
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        if name == "service":
            assert f"PRISM_PORT={ports['http']} " in dockerfile
            assert f"PRISM_METRICS_PORT={ports['metrics']} " in dockerfile
            assert f"EXPOSE {ports['http']} {ports['metrics']}" in dockerfile
        else:
            assert f"PRISM_WORKER_METRICS_PORT={ports['metrics']} " in dockerfile
            assert f"EXPOSE {ports['metrics']}" in dockerfile


def test_selectors_find_exactly_their_pods(documents: Documents) -> None:
    """Services, budgets and workloads; no two workloads take each other's pods."""
    for kind in ("Service", "PodDisruptionBudget", *WORKLOADS):
        for document in of_kind(documents, kind):
            selector = document["spec"]["selector"]
            selector = {"matchLabels": selector} if kind == "Service" else selector
            taken = [pod for pod in pods(documents) if matches(selector, pod["metadata"]["labels"])]
            assert len(taken) == 1, (kind, document["metadata"]["name"])
            if kind == "Service":
                named = {port["name"] for each in taken[0]["spec"]["containers"] for port in each["ports"]}
                assert {port["targetPort"] for port in document["spec"]["ports"]} <= named


def test_monitors_find_their_targets() -> None:
    """The front end by its Service, workers by their pods, on the port that is called metrics."""
    documents = rendered("gpu")
    (monitor,) = of_kind(documents, "ServiceMonitor")
    (service,) = (
        each
        for each in of_kind(documents, "Service")
        if matches(monitor["spec"]["selector"], each["metadata"]["labels"])
    )
    assert {each["port"] for each in monitor["spec"]["endpoints"]} <= {
        each["name"] for each in service["spec"]["ports"]
    }
    (pod_monitor,) = of_kind(documents, "PodMonitor")
    found = [
        each
        for each in pods(documents)
        if matches(pod_monitor["spec"]["selector"], each["metadata"]["labels"])
    ]
    assert len(found) == len(of_kind(documents, "ScaledObject"))
    for each in found:
        assert {"metrics"} <= {port["name"] for port in each["spec"]["containers"][0]["ports"]}


def test_nothing_is_open_but_what_a_policy_opens(documents: Documents) -> None:
    """Everything is denied first; every other policy names the pods and the ports that it opens."""
    policies = of_kind(documents, "NetworkPolicy")
    deny = next(each["spec"] for each in policies if each["metadata"]["name"] == "default-deny")
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in (each["spec"] for each in policies if each["spec"] != deny):
        assert policy.get("ingress") or policy.get("egress")
        for opened in (*policy.get("ingress", ()), *policy.get("egress", ())):
            assert opened["ports"]
        if policy["podSelector"]:
            taken = [
                each for each in pods(documents) if matches(policy["podSelector"], each["metadata"]["labels"])
            ]
            assert taken
            named = {
                port["name"] for each in taken for one in each["spec"]["containers"] for port in one["ports"]
            }
            for opened in policy.get("ingress", ()):
                assert {port["port"] for port in opened["ports"]} <= named


def test_the_metadata_service_is_out_of_reach(documents: Documents) -> None:
    """Whoever may leave the cluster may not go to the cloud's credentials."""
    blocks = [
        to["ipBlock"]
        for policy in of_kind(documents, "NetworkPolicy")
        for opened in policy["spec"].get("egress", ())
        for to in opened.get("to", ())
        if "ipBlock" in to
    ]
    assert blocks
    assert all("169.254.0.0/16" in block["except"] for block in blocks)


def test_the_environment_names_settings_that_exist(documents: Documents) -> None:
    """No name is misspelt: a container's own are its settings', shared ones those of either side."""
    either = variables("service") | variables("worker")
    for name, container in ours(documents):
        own = {each["name"] for each in container.get("env", ())}
        assert own <= variables(name)
        assert environment(container, documents).keys() <= either | FOREIGN


def test_the_settings_accept_the_environment(documents: Documents) -> None:
    """Each container would start: values are valid, and front end and workers agree on the media store."""
    stores = {accepted(name, environment(each, documents)).media_url for name, each in ours(documents)}
    assert len(stores) == 1


def test_grace_is_longer_than_the_longest_job(documents: Documents) -> None:
    """A worker that is asked to go finishes what it holds; a front end closes what it has open."""
    graces: dict[str, set[float]] = {"service": set(), "worker": set()}
    longest = 0.0
    for document, pod in workloads(documents):
        name = document["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]
        if name not in graces:
            continue
        (container,) = pod["containers"]
        settings = accepted(name, environment(container, documents))
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["terminationGracePeriodSeconds"] >= pause + settings.grace_s + 10
        graces[name].add(settings.grace_s)
        if isinstance(settings, ServiceSettings):
            longest = settings.max_deadline_s
    assert longest
    assert min(graces["worker"]) >= longest


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_traces_are_a_component_that_reaches_the_collector(tmp_path: Path, overlay: str) -> None:
    """Added to an overlay it tells every front end and worker one endpoint, and opens the way to that."""
    parts = {"resources": f"overlays/{overlay}", "components": "components/tracing"}
    paths = {key: [os.path.relpath(ROOT / "k8s" / path, tmp_path)] for key, path in parts.items()}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(paths))
    documents = kustomized(tmp_path)
    test_the_environment_names_settings_that_exist(documents)
    (endpoint,) = {
        accepted(name, environment(each, documents)).tracing_endpoint for name, each in ours(documents)
    }
    host, port = present(endpoint).removeprefix("http://").split(":")
    (opened,) = (
        each["spec"]["egress"][0]
        for each in of_kind(documents, "NetworkPolicy")
        if each["metadata"]["name"] == "traces"
    )
    assert opened["ports"] == [{"protocol": "TCP", "port": int(port)}]
    (namespace,) = opened["to"][0]["namespaceSelector"]["matchLabels"].values()
    assert host.split(".")[1] == namespace


def test_a_rollout_never_needs_a_spare_gpu() -> None:
    """One GPU a worker, and the old pod goes before the new one comes; the front end the other way round."""
    for document in of_kind(rendered("gpu"), "Deployment"):
        rolling = document["spec"]["strategy"]["rollingUpdate"]
        pod = document["spec"]["template"]["spec"]
        if document["metadata"]["name"] == "service":
            assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
            continue
        assert rolling == {"maxSurge": 0, "maxUnavailable": 1}
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert [each["key"] for each in pod["tolerations"]] == ["nvidia.com/gpu"]


def test_volumes_that_are_mounted_exist(documents: Documents) -> None:
    """Each mount is a volume of the pod, each claim one of the overlay; the workers' caches are theirs."""
    claims = {each["metadata"]["name"] for each in of_kind(documents, "PersistentVolumeClaim")}
    for document, pod in workloads(documents):
        volumes = {each["name"]: each for each in pod.get("volumes", ())}
        templates = {each["metadata"]["name"] for each in document["spec"].get("volumeClaimTemplates", ())}
        mounted = {mount["name"] for each in pod["containers"] for mount in each.get("volumeMounts", ())}
        assert mounted == volumes.keys() | templates
        claimed = {
            each["persistentVolumeClaim"]["claimName"]
            for each in volumes.values()
            if "persistentVolumeClaim" in each
        }
        assert claimed <= claims


def test_secrets_are_not_in_files() -> None:
    """What the cluster with real keys needs is made by hand; the demo's secret holds an address only."""
    assert of_kind(rendered("gpu"), "Secret") == []
    (secret,) = of_kind(rendered("cpu-demo"), "Secret")
    assert set(secret["data"]) == {"PRISM_BROKER_URL"}


def test_callers_need_a_key_where_there_is_no_demo() -> None:
    """Nothing lets anonymous callers in; without keys from the secret the front end refuses to start."""
    for _, container in ours(rendered("gpu"), "service"):
        assert "PRISM_ALLOW_ANONYMOUS" not in environment(container, rendered("gpu"))

"""The overlays as a cluster would get them: valid, restricted, and in step with the code."""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

import kubernetes_validate
import pytest
import yaml

from docs.sizes import CHECKPOINTS, PRECISIONS, rows
from service.app import create_app
from service.settings import ServiceSettings
from tests.deploy.conftest import (
    OVERLAYS,
    ROOT,
    Document,
    accepted,
    keeps_accepted_jobs,
    kustomized,
    rendered,
    room_for_videos,
    size,
    variables,
)
from tests.present import present
from worker.probes import STALLED_S, Probes
from worker.settings import WorkerSettings

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
            "fallback",
            "advanced",
            "triggers",
        },
        "triggers": {"type", "metricType", "metadata"},
        "fallback": {"failureThreshold", "replicas", "behavior"},
        "advanced": {"horizontalPodAutoscalerConfig"},
    },
}
"""The custom kinds in use, and those fields of their specs that we need, by where they stand."""
FOREIGN = {
    "HF_TOKEN",
    "HF_HOME",
    "AWS_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "OMP_NUM_THREADS",
}
"""Environment of the hub's client, the object store's, and of torch's threads."""
OLDEST = "1.30"
"""Kubernetes' first with `preStop.sleep` in every cluster."""
SYSTEM = {"cpu": 0.95, "memory": 290 << 20}
"""What kind asks for on its one node: API server, etcd, scheduler, controllers, two resolvers, network."""
LINK_LOCAL = IPv4Network("169.254.0.0/16")
METADATA = ("169.254.169.254", "169.254.170.2", "169.254.170.23")
"""Where clouds hand out the machine's credentials, and the container's."""
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
    return found | {each["name"]: value(each, container) for each in container.get("env", ())}


def value(entry: Document, container: Document) -> str:
    """Of one variable: as it is written, or the container's own resource that it refers to."""
    if "value" in entry:
        return str(entry["value"])
    bound, _, resource = entry["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
    return str(container["resources"][bound][resource])


def test_every_document_is_what_kubernetes_takes(documents: Documents) -> None:
    """By its schemas; of the custom kinds, the fields that we know to be theirs."""
    for document in documents:
        fields = CUSTOM.get((document["apiVersion"], document["kind"]))
        if fields is None:
            for version in (OLDEST, "1.35"):
                kubernetes_validate.validate(document, version, strict=True)
            continue
        for where, known in fields.items():
            found = document["spec"][where] if where else document["spec"]
            for each in found if isinstance(found, list) else [found]:
                assert each.keys() <= known


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_says_what_kubernetes_it_needs(overlay: str) -> None:
    """The oldest whose schemas take it; on an older one the pods would be refused, or drop requests."""
    head, *_ = (ROOT / "k8s" / "overlays" / overlay / "kustomization.yaml").read_text().split("apiVersion:")
    assert f"Kubernetes {OLDEST} or newer" in head


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
    open_routes = {
        ("service", "http"): routes,
        ("service", "metrics"): {"/livez"},
        ("worker", "metrics"): {"/livez", "/readyz"},
    }
    for name, container in ours(documents):
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["port"] in ports
            assert asked["path"] in open_routes[name, asked["port"]]
        assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_a_full_front_end_gets_no_more_callers_but_is_not_restarted(documents: Documents) -> None:
    """The callers' port refuses everybody then, probes too; on the metrics port nobody waits in line."""
    for _, container in ours(documents, "service"):
        assert container["readinessProbe"]["httpGet"]["port"] == "http"
        assert container["livenessProbe"]["httpGet"]["port"] == "metrics"


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
        (IPv4Network(to["ipBlock"]["cidr"]), to["ipBlock"].get("except", ()), opened["ports"])
        for policy in of_kind(documents, "NetworkPolicy")
        for opened in policy["spec"].get("egress", ())
        for to in opened.get("to", ())
        if "ipBlock" in to
    ]
    assert any(not block.subnet_of(LINK_LOCAL) for block, _, _ in blocks)
    for block, but_for, ports in blocks:
        if block.subnet_of(LINK_LOCAL):  # the node's own resolver
            assert not any(IPv4Address(address) in block for address in METADATA)
            assert {port["port"] for port in ports} == {53}
        else:
            assert str(LINK_LOCAL) in but_for


def test_names_are_resolved_by_the_cluster_or_on_the_node(documents: Documents) -> None:
    """Every pod may ask the resolver in `kube-system`, or NodeLocal DNSCache, which is in no namespace."""
    (policy,) = (
        each["spec"]
        for each in of_kind(documents, "NetworkPolicy")
        if any(port["port"] == 53 for opened in each["spec"].get("egress", ()) for port in opened["ports"])
    )
    assert policy["podSelector"] == {}
    (opened,) = policy["egress"]
    assert {port["protocol"] for port in opened["ports"]} == {"UDP", "TCP"}
    on_the_node = {to["ipBlock"]["cidr"] for to in opened["to"] if "ipBlock" in to}
    assert on_the_node == {"169.254.20.10/32", "169.254.25.10/32"}
    assert any("namespaceSelector" in to for to in opened["to"])


def test_the_environment_names_settings_that_exist(documents: Documents) -> None:
    """No name is misspelt: a container's own are its settings', shared ones those of either side."""
    either = variables("service") | variables("worker")
    for name, container in ours(documents):
        own = {each["name"] for each in container.get("env", ())}
        assert own <= variables(name) | FOREIGN
        assert environment(container, documents).keys() <= either | FOREIGN


def test_the_settings_accept_the_environment(documents: Documents) -> None:
    """Each container would start: values are valid, and front end and workers agree on the media store."""
    stores = {accepted(name, environment(each, documents)).media_url for name, each in ours(documents)}
    assert len(stores) == 1


def test_grace_is_longer_than_the_longest_job_and_the_longest_wait(documents: Documents) -> None:
    """A worker that is asked to go finishes what it holds; a front end stays for callers who wait."""
    graces: dict[str, set[float]] = {"service": set(), "worker": set()}
    longest_job = longest_wait = 0.0
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
            longest_job = settings.max_deadline_s
            longest_wait = max(settings.max_timeout_s, settings.max_deadline_s)  # a stream ends with its job
    assert longest_job
    assert min(graces["worker"]) >= longest_job
    assert min(graces["service"]) >= longest_wait


def test_a_rollout_has_failed_only_after_drain_and_startup(documents: Documents) -> None:
    """On a full cluster the new worker waits for the old one's GPU, and then loads its model."""
    for document, pod in workloads(documents):
        if document["metadata"]["labels"]["app.kubernetes.io/name"] == "worker":
            startup = pod["containers"][0]["startupProbe"]
            loading_s = startup["periodSeconds"] * startup["failureThreshold"]
            drained_s = pod["terminationGracePeriodSeconds"]
            assert document["spec"]["progressDeadlineSeconds"] > drained_s + loading_s


def test_pods_that_never_get_ready_do_not_keep_a_node(documents: Documents) -> None:
    """A drain may evict them whatever the budget says: nobody is served by them."""
    budgets = of_kind(documents, "PodDisruptionBudget")
    assert budgets
    assert {each["spec"]["unhealthyPodEvictionPolicy"] for each in budgets} == {"AlwaysAllow"}


def test_a_worker_starts_as_many_threads_as_it_has_cores(documents: Documents) -> None:
    """Left alone it starts one a core of the node, and those beyond the quota spin the others' time away."""
    for _, container in ours(documents, "worker"):
        assert environment(container, documents)["OMP_NUM_THREADS"] == container["resources"]["limits"]["cpu"]


def test_a_front_end_has_room_for_bodies(documents: Documents) -> None:
    """Eight of the largest uploads on disk; in memory 32 of the largest JSON bodies, three times each."""
    for document, pod in workloads(documents):
        if document["metadata"]["name"] == "service":
            (container,) = pod["containers"]
            settings = accepted("service", environment(container, documents))
            assert isinstance(settings, ServiceSettings)
            (scratch,) = (each["emptyDir"] for each in pod["volumes"] if each["name"] == "tmp")
            limits = container["resources"]["limits"]
            assert scratch.keys() == {"sizeLimit"}  # on disk: in memory it would count against the limit
            room = min(size(scratch["sizeLimit"]), size(limits["ephemeral-storage"]))
            assert room >= 8 * settings.max_multipart_bytes
            assert size(limits["memory"]) >= 32 * 3 * settings.max_json_bytes


def test_a_worker_has_room_for_videos(documents: Documents) -> None:
    """The largest for every job that it may hold on disk, and in memory for those that are decoded."""
    for document, pod in workloads(documents):
        if document["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] == "worker":
            (container,) = pod["containers"]
            disk, memory = room_for_videos(accepted("worker", environment(container, documents)))
            (scratch,) = (each["emptyDir"] for each in pod["volumes"] if each["name"] == "tmp")
            limits = container["resources"]["limits"]
            assert scratch.keys() == {"sizeLimit"}  # on disk: in memory it would count against the limit
            assert min(size(scratch["sizeLimit"]), size(limits["ephemeral-storage"])) >= disk
            assert size(limits["memory"]) >= memory


def test_scratch_volumes_do_not_keep_a_node(documents: Documents) -> None:
    """The cluster autoscaler removes a node with local volumes only where each is named as one to lose."""
    for document, pod in workloads(documents):
        scratch = {each["name"] for each in pod.get("volumes", ()) if "emptyDir" in each}
        annotations = document["spec"]["template"]["metadata"].get("annotations", {})
        named = annotations.get("cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes", "")
        assert set(filter(None, named.split(","))) == scratch


def test_workers_only_read_media() -> None:
    """They decode what strangers send; only the front end stores and deletes."""
    ((_, worker),) = ours(rendered("cpu-demo"), "worker")
    ((_, front_end),) = ours(rendered("cpu-demo"), "service")
    read_only = {
        name: mount.get("readOnly", False)
        for name, container in (("worker", worker), ("service", front_end))
        for mount in container["volumeMounts"]
        if mount["mountPath"] == "/media"
    }
    assert read_only == {"worker": True, "service": False}


@pytest.mark.parametrize("resource", SYSTEM)
def test_the_demo_fits_its_node_while_it_is_rolled_out(resource: str) -> None:
    """CPUs and GiB as its head says: for the front end's surge, and what the cluster itself asks for."""
    documents = rendered("cpu-demo")
    head = (ROOT / "k8s/overlays/cpu-demo/kustomization.yaml").read_text()
    cpus, gib = map(int, present(re.search(r"(\d+) CPUs and (\d+) GiB", head)).groups())
    replicas = {
        each["spec"]["scaleTargetRef"]["name"]: each["spec"]["minReplicas"]
        for each in of_kind(documents, "HorizontalPodAutoscaler")
    }
    asked = SYSTEM[resource]
    for document, pod in workloads(documents):
        name, rolling = document["metadata"]["name"], document["spec"].get("strategy", {})
        surge = rolling.get("rollingUpdate", {}).get("maxSurge", 0)
        for container in pod["containers"]:
            asked += (replicas.get(name, 1) + surge) * amount(container["resources"]["requests"][resource])
    assert asked <= {"cpu": cpus, "memory": gib << 30}[resource]


def amount(quantity: str) -> float:
    """Of CPUs, `150m` or `2`; of bytes, `256Mi`."""
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else size(quantity)


def test_a_broker_that_loads_its_file_is_alive_and_not_ready() -> None:
    """`valkey-cli ping` prints LOADING and succeeds; `-e` makes it fail, which must not have it restarted."""
    ((_, broker),) = ours(rendered("cpu-demo"), "valkey")
    asked = {kind: broker[f"{kind}Probe"]["exec"]["command"] for kind in ("startup", "liveness", "readiness")}
    strict = ["valkey-cli", "-e", "ping"]
    assert asked == {"startup": strict, "liveness": ["valkey-cli", "ping"], "readiness": strict}


def test_the_demos_broker_keeps_accepted_jobs() -> None:
    """On disk, none is evicted, and a full broker refuses instead of being killed."""
    ((_, broker),) = ours(rendered("cpu-demo"), "valkey")
    assert keeps_accepted_jobs(broker["args"], broker["resources"]["limits"]["memory"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_registry_is_named_in_one_place(overlay: str) -> None:
    """What an overlay's `images` say is what each of its pods of ours is made from."""
    body = yaml.safe_load((ROOT / "k8s" / "overlays" / overlay / "kustomization.yaml").read_text())
    assert [each["name"] for each in body["images"]] == ["prismprune/service", "prismprune/worker"]
    named = {f"{each['newName']}:{each['newTag']}" for each in body["images"]}
    assert {container["image"] for _, container in ours(rendered(overlay))} == named


def test_the_front_end_expects_every_model_that_is_deployed() -> None:
    """So that one whose first worker never comes is missed, and the queue of each is there to scale by."""
    documents = rendered("gpu")
    ((_, front_end),) = ours(documents, "service")
    settings = accepted("service", environment(front_end, documents))
    assert isinstance(settings, ServiceSettings)
    workers = [accepted("worker", environment(each, documents)) for _, each in ours(documents, "worker")]
    assert sorted((settings.model, *settings.models)) == sorted(each.model for each in workers)


def test_the_shared_cache_names_its_storage_class() -> None:
    """A default class seldom makes volumes that many nodes can mount: the operator says which one does."""
    (claim,) = of_kind(rendered("gpu"), "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["storageClassName"]


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


def test_every_model_fits_the_gpus_that_the_overlay_asks_for() -> None:
    """By the table of sizes, with two gigabytes beside: a worker may come to the smallest card there is."""
    head = (ROOT / "k8s/overlays/gpu/kustomization.yaml").read_text()
    (smallest,) = map(int, re.findall(r"GPUs of (\d+) GB or more", head))
    planned = {each.name.lower(): each for each in CHECKPOINTS}
    for _, container in ours(rendered("gpu"), "worker"):
        settings = accepted("worker", environment(container, rendered("gpu")))
        assert isinstance(settings, WorkerSettings)
        (checkpoint,) = (each for name, each in planned.items() if name in settings.model.lower())
        first, *_ = rows(checkpoint)
        assert checkpoint.budgets[0] == settings.default_token_budget
        gib = dict(zip(PRECISIONS.values(), map(float, first.strip("| ").split(" | ")[3:]), strict=True))
        assert (gib[settings.quantization] + 2) * 2**30 <= smallest * 10**9


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
    for secret in of_kind(rendered("cpu-demo"), "Secret"):
        assert set(secret["data"]) == {"PRISM_BROKER_URL"}


def test_each_side_has_a_secret_of_its_own(documents: Documents) -> None:
    """Who takes over a worker, which decodes what strangers send, has not got the callers' keys."""
    read = {name: secrets_of(container) for name, container in ours(documents)}
    assert all(len(names) == 1 for names in read.values())
    assert read["service"] != read["worker"]


def secrets_of(container: Document) -> set[str]:
    return {each["secretRef"]["name"] for each in container["envFrom"] if "secretRef" in each}


def test_the_gpu_overlays_head_makes_what_its_pods_read() -> None:
    """First the namespace, then the secret of each side, with what that side has a use for; then the rest."""
    text = (ROOT / "k8s/overlays/gpu/kustomization.yaml").read_text()
    head = re.sub(r"\\\n# *", "", text[: text.index("apiVersion:")])
    steps = [line.lstrip("# ") for line in head.splitlines() if line.startswith("#   kubectl")]
    first, *made, last = steps
    assert (first, last) == ("kubectl apply -f k8s/base/namespace.yaml", "kubectl apply -k k8s/overlays/gpu")
    wanted = dict(ours(rendered("gpu")))
    for (name, container), command, own in zip(
        sorted(wanted.items()), made, ("PRISM_API_KEYS", "HF_TOKEN"), strict=True
    ):
        assert command.split()[:6] == ["kubectl", "-n", "prismprune", "create", "secret", "generic"], name
        assert {command.split()[6]} == secrets_of(container)
        keys = set(re.findall(r"--from-literal=(\w+)=", command))
        assert keys == {"PRISM_BROKER_URL", own, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def test_callers_need_a_key_where_there_is_no_demo() -> None:
    """Nothing lets anonymous callers in; without keys from the secret the front end refuses to start."""
    for _, container in ours(rendered("gpu"), "service"):
        assert "PRISM_ALLOW_ANONYMOUS" not in environment(container, rendered("gpu"))

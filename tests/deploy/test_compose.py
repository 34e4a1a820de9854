"""Images and compose files: hardened, private to the machine, and in step with the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import yaml

from service.settings import ServiceSettings
from tests.deploy.conftest import (
    ROOT,
    Document,
    accepted,
    keeps_accepted_jobs,
    room_for_videos,
    size,
    variables,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploy.conftest import Compose

DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS = ("service", "worker")
GPU = ("docker-compose.yml", "docker-compose.gpu.yml")


def stage(name: str) -> str:
    """The instructions of one stage of the Dockerfile, continued lines joined."""
    stages = re.split(r"^FROM ", DOCKERFILE.replace("\\\n", ""), flags=re.MULTILINE)
    (found,) = (each for each in stages if re.match(rf"\S+ AS {name}\n", each))
    return found


def image_environment(name: str) -> dict[str, str]:
    """What the image of `service` or `worker` sets."""
    lines = re.findall(r"^ENV (.+)$", stage(name), re.MULTILINE)
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


def told(service: Document, name: str) -> dict[str, str]:
    """The environment of a container: the image's under compose's."""
    return image_environment(name) | {key: str(value) for key, value in service["environment"].items()}


def seconds(duration: str) -> int:
    """`630s`, `1h2m`."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


def test_the_images_run_as_nobody_in_particular() -> None:
    """A numeric user, so that Kubernetes can tell that it is not root; the last word in both stages."""
    for name in OURS:
        assert re.findall(r"^USER (.+)$", stage(name), re.MULTILINE) == ["10001:10001"]


def test_the_images_start_without_a_shell() -> None:
    """Signals reach the process: entry point and health check are lists."""
    for name in OURS:
        (entry,) = re.findall(r"^ENTRYPOINT (.+)$", stage(name), re.MULTILINE)
        assert json.loads(entry) == ["python3", "-m", name]
        (check,) = re.findall(r"^HEALTHCHECK .*?CMD (.+)$", stage(name), re.MULTILINE)
        command = json.loads(check)
        assert command[:2] == ["python3", "-c"]
        compile(command[2], "HEALTHCHECK", "exec")
        assert "/readyz" in command[2]


def test_the_images_are_built_from_the_lock() -> None:
    """What is installed, but for the build's own tools, is held to constraints.txt or comes alone."""
    for name in OURS:
        for part, held in (
            ("dependencies", "--constraint constraints.txt --requirement"),
            ("build", "--no-deps"),
        ):
            (line,) = re.findall(r"pip install (.+)$", stage(f"{part}-{name}"), re.MULTILINE)
            assert held in line


def test_dependencies_are_made_anew_by_their_own_list_alone() -> None:
    """Gigabytes: no page, version or line of our own code is copied below them, and what is, by its bytes."""
    for name in OURS:
        ours, wanted = (
            stage(f"dependencies-{name}"),
            ["constraints.txt ./", f"--from=requirements /src/{name}.txt ./"],
        )
        assert ours.startswith("build AS ")
        assert re.findall(r"^COPY (.+)$", ours, re.MULTILINE) == wanted
    assert "COPY" not in stage("build") + stage("base")
    assert re.findall(r"^COPY (.+)$", stage("requirements"), re.MULTILINE) == ["pyproject.toml ./"]


def test_our_own_packages_are_a_layer_above_the_dependencies() -> None:
    """A small one, laid as in the environment that it joins; the commit, which is always new, above both."""
    for name in OURS:
        assert re.findall(r"--prefix (\S+) \.$", stage(f"build-{name}"), re.MULTILINE) == ["/own"]
        layers = re.findall(r"^(COPY .+|RUN .+|ARG REVISION.*)$", stage(name), re.MULTILINE)
        copies = [
            f"COPY --from=dependencies-{name} /opt/prism /opt/prism",
            f"COPY --from=build-{name} /own /opt/prism",
        ]
        above = ['ARG REVISION=""'] if name == "service" else []
        assert layers[-2 - len(above) :] == copies + above


def test_the_requirements_are_those_of_each_image(tmp_path: Path) -> None:
    """The stage's own program, on pyproject.toml as it is."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (command,) = re.findall(r"^RUN python3 -c \"(.+)\"$", stage("requirements"), re.MULTILINE)
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert (tmp_path / "service.txt").read_text().split("\n") == extras["service"] + extras["tracing"]
    wanted = project["dependencies"] + [
        each for extra in ("worker", "demo", "quantization", "tracing") for each in extras[extra]
    ]
    assert (tmp_path / "worker.txt").read_text().split("\n") == wanted


def test_the_front_ends_image_has_no_heavy_parts() -> None:
    """Its own extra and that for traces name none of them; of the worker it has two modules."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[\[<>=]", each)[0] for each in extras["service"] + extras["tracing"]}
    assert not names & {"torch", "torchvision", "transformers", "numpy", "av", "prismprune", "accelerate"}
    copied = re.findall(r"^COPY (?!--from)(.+)$", stage("build-service"), re.MULTILINE)
    assert copied == [
        "pyproject.toml README.md LICENSE ./",
        "service service",
        "worker/__init__.py worker/contract.py worker/logs.py worker/",
    ]


def test_the_build_sees_nothing_but_what_it_needs() -> None:
    """An allow list: no repository, no environment, no secret of the machine goes to the builder."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert all(line.startswith(("!", "**/__pycache__")) for line in lines[1:])
    for name in (line.removeprefix("!") for line in lines if line.startswith("!")):
        assert (ROOT / name).exists()


def test_the_images_environment_is_of_settings_that_exist() -> None:
    """Misspelt names would be ignored in silence."""
    for name in OURS:
        assert {key for key in image_environment(name) if key.startswith("PRISM_")} <= variables(name)


def test_everything_is_published_on_loopback_alone(compose: Compose) -> None:
    """The demo asks for no key: nobody else may reach it. Broker and worker are not published at all."""
    published = {name: service["ports"] for name, service in compose().items() if service.get("ports")}
    assert set(published) == {"service", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert not any(service.get("network_mode") for service in compose().values())


def test_every_container_is_hardened_and_limited(compose: Compose) -> None:
    """Read-only, without capabilities, bounded, restarted, and healthy by a check."""
    for name, service in compose(*GPU, PRISM_MODEL="m").items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert service["pids_limit"]
        assert service["restart"] == "unless-stopped"
        assert not service.get("privileged")
        if name not in OURS:
            assert service["healthcheck"]["test"][0] == "CMD"
            assert not service["user"].startswith(("0", "root"))
            assert not service["image"].endswith(":latest")


def test_the_environment_names_settings_that_exist_and_accept_it(compose: Compose) -> None:
    """With nothing set by the user, and with a model on a GPU."""
    for services in (compose(), compose(*GPU, PRISM_MODEL="llava-hf/llava-1.5-7b-hf")):
        front_end, worker = (accepted(name, told(services[name], name)) for name in OURS)
        for name in OURS:
            assert {key for key in services[name]["environment"] if key.startswith("PRISM_")} <= variables(
                name
            )
        assert front_end.broker_url == worker.broker_url
        assert front_end.media_url == worker.media_url
        assert front_end.model == worker.model


def test_front_end_and_worker_share_the_media(compose: Compose) -> None:
    """One volume under the store's directory; the worker only reads."""
    services = compose()
    settings = accepted("service", told(services["service"], "service"))
    directory = settings.media_url.removeprefix("file://")
    assert f"media:{directory}" in services["service"]["volumes"]
    assert f"media:{directory}:ro" in services["worker"]["volumes"]
    assert f"--group=prism /cache {directory}" in stage("base")


def test_uploads_are_spooled_on_disk(compose: Compose) -> None:
    """A tmpfs counts as the container's memory, of which a few of the largest videos would leave nothing."""
    front_end = compose()["service"]
    assert "spool:/tmp" in front_end["volumes"]
    assert "tmpfs" not in front_end


def test_a_worker_has_room_for_videos(compose: Compose) -> None:
    """On disk, in a volume of each worker's own: a tmpfs counts as memory, where videos are decoded."""
    worker = compose()["worker"]
    _, memory = room_for_videos(accepted("worker", told(worker, "worker")))
    assert "/tmp" in worker["volumes"]  # noqa: S108 - a container's
    assert "tmpfs" not in worker
    assert size(worker["mem_limit"]) >= memory


def test_workers_do_not_share_compiled_code() -> None:
    """Triton's is loaded as it lies; all workers may write the cache, and none another's `/tmp`."""
    assert image_environment("worker")["TRITON_HOME"] == "/tmp"  # noqa: S108 - a container's


def test_the_images_have_the_names_that_they_are_built_by() -> None:
    """By the Dockerfile's commands, in compose and in the manifests; the tag is this version."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    built = dict(re.findall(r"^#   docker build --target (\S+) +-t (\S+) \.$", DOCKERFILE, re.MULTILINE))
    assert built == {name: f"prismprune/{name}:{version}" for name in OURS}
    composed = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert built == {name: composed[name]["image"] for name in OURS}
    for name, path in (("service", "k8s/base/service.yaml"), ("worker", "k8s/worker/worker.yaml")):
        assert f" image: {built[name]}\n" in (ROOT / path).read_text()


def test_grace_is_longer_than_the_longest_wait(compose: Compose) -> None:
    """`docker compose stop` lets running jobs end, and callers have their answers."""
    services = compose()
    front_end = accepted("service", told(services["service"], "service"))
    worker = accepted("worker", told(services["worker"], "worker"))
    assert isinstance(front_end, ServiceSettings)
    assert worker.grace_s >= front_end.max_deadline_s
    assert front_end.grace_s >= max(front_end.max_timeout_s, front_end.max_deadline_s)
    assert seconds(services["worker"]["stop_grace_period"]) >= worker.grace_s + 10
    assert seconds(services["service"]["stop_grace_period"]) >= front_end.grace_s + 10


def test_the_broker_keeps_accepted_jobs(compose: Compose) -> None:
    """Written to disk on a volume, nothing is evicted, and a full broker refuses instead of being killed."""
    broker = compose()["broker"]
    assert keeps_accepted_jobs(broker["command"], broker["mem_limit"])
    assert "broker:/data" in broker["volumes"]


def test_a_broker_is_healthy_once_it_has_loaded_its_file(compose: Compose) -> None:
    """`valkey-cli ping` prints LOADING and succeeds; `-e` makes it fail, for which there is time."""
    check = compose()["broker"]["healthcheck"]
    assert check["test"] == ["CMD", "valkey-cli", "-e", "ping"]
    assert seconds(check["start_period"]) >= 300


def test_prometheus_scrapes_the_ports_that_are_served(compose: Compose) -> None:
    """By the services' names, on the metrics ports of the images."""
    config = yaml.safe_load((ROOT / "monitoring/prometheus.yml").read_text())
    scraped = {
        (found["names"][0], found["port"])
        for job in config["scrape_configs"]
        for found in job["dns_sd_configs"]
    }
    ports = {
        "service": int(image_environment("service")["PRISM_METRICS_PORT"]),
        "worker": int(image_environment("worker")["PRISM_WORKER_METRICS_PORT"]),
    }
    assert scraped == set(ports.items())
    mounts = dict(volume.split(":")[:2] for volume in compose()["prometheus"]["volumes"])
    for name in ("prometheus.yml", *config["rule_files"]):
        assert mounts[f"./monitoring/{name}"] == f"/etc/prometheus/{name}"


def test_volumes_are_declared() -> None:
    """Each named volume is one of the file's."""
    body = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    used = {
        volume.split(":")[0]
        for service in body["services"].values()
        for volume in service.get("volumes", ())
        if not volume.startswith((".", "/"))
    }
    assert used == set(body["volumes"])


def test_the_gpu_override_gives_the_worker_one_gpu(compose: Compose) -> None:
    """One device, CUDA, and a model that the user must name."""
    worker = compose(*GPU, PRISM_MODEL="m")["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert worker["environment"]["PRISM_DEVICE"] == "cuda"
    assert "gcc" in worker["build"]["args"]["APT_PACKAGES"].split()
    assert "ARG APT_PACKAGES" in stage("worker")
    assert "${PRISM_MODEL:?" in (ROOT / "docker-compose.gpu.yml").read_text()

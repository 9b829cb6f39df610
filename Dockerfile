FROM python:3.12-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir --constraint constraints.txt uv
COPY src src
COPY config config
COPY producer producer
COPY worker worker
RUN uv pip install --system --no-cache --compile-bytecode --constraint constraints.txt --build-constraint constraints.txt \
    '.[worker,heic]'
# FlexAttention, which is next where the first form of attention is not right on a GPU, is compiled at start.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# The worker needs no privileges: it reads media and a checkpoint, and talks to Redis.
RUN useradd --system --create-home keye && install --directory --mode=700 --owner=keye /var/tmp/keye-spool
USER keye
ENTRYPOINT ["keye-worker"]
CMD ["run"]

# The language service with vLLM as its engine, on NVIDIA GPUs. Build from the repository's root:
#   docker build -f deploy/docker/language-vllm.Dockerfile -t lookonce-language-vllm .
# vLLM at the one release that the engine is written to (pyproject.toml's group language-vllm), with the versions of torch
# and transformers that it pins itself: constraints.txt is for everything else.
# Another image by the name your registry has for it, or one that holds your pip.conf and certificates: --build-arg PYTHON=...
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m pip install "pip==25.3" && python -m venv --without-pip /opt/lookonce
COPY pyproject.toml ./
RUN python -m pip --python /opt/lookonce/bin/python install --group language-vllm
COPY LICENSE README.md ./
COPY protos protos
COPY lookonce lookonce
COPY vision_service vision_service
COPY lm_service lm_service
COPY gateway gateway
RUN python -m pip --python /opt/lookonce/bin/python install --no-deps .

FROM ${PYTHON}
LABEL org.opencontainers.image.title="lookonce language service with vLLM" org.opencontainers.image.licenses="Apache-2.0"
# vLLM compiles kernels at start: a C compiler. What it caches goes to /models, so that the root can be read-only.
RUN apt-get update && apt-get install -y --no-install-recommends gcc=4:12.2.0-3 libc6-dev=2.36-9+deb12u13 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/lookonce/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/models/hub LOOKONCE_CACHE_DIR=/models/cache VLLM_CACHE_ROOT=/models/vllm TRITON_CACHE_DIR=/models/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility VLLM_NO_USAGE_STATS=1 \
    LOOKONCE_LM_LISTEN=0.0.0.0:50052 LOOKONCE_LM_METRICS_LISTEN=0.0.0.0:9090 LOOKONCE_LM_LOG_FORMAT=json \
    LOOKONCE_LM_ENGINE=vllm
RUN groupadd --gid 10001 lookonce && useradd --uid 10001 --gid lookonce --no-create-home --home-dir /tmp lookonce \
    && install -d -o lookonce -g lookonce /models
COPY --from=build /opt/lookonce /opt/lookonce
VOLUME /models
USER 10001:10001
EXPOSE 50052 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["sh", "-c", "exec python -m lookonce.cli.health ${LOOKONCE_LM_LISTEN}"]
ENTRYPOINT ["python", "-m", "lm_service"]

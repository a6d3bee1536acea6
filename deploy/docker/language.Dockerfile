# The language service, for the CPU or for CUDA. Build from the repository's root:
#   docker build -f deploy/docker/language.Dockerfile -t lookonce-language .
#   docker build -f deploy/docker/language.Dockerfile -t lookonce-language:cuda --build-arg VARIANT=cuda .
# Another image by the name your registry has for it, or one that holds your pip.conf and certificates: --build-arg PYTHON=...
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
# cpu or cuda: torch comes from PyTorch's index of CPU wheels (of which a mirror needs torch alone), or with its CUDA
# libraries from the package index.
ARG VARIANT=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m pip install "pip==25.3" && python -m venv --without-pip /opt/lookonce
COPY pyproject.toml constraints.txt ./
RUN set -- install -c constraints.txt --group language \
    && case "${VARIANT}" in \
      cpu) python -m pip --python /opt/lookonce/bin/python install --no-deps --index-url "${TORCH_INDEX}" \
             "$(sed -n 's/^torch==.*/&+cpu/p' constraints.txt)" ;; \
      cuda) set -- "$@" bitsandbytes ;; \
      *) echo "VARIANT must be cpu or cuda, not ${VARIANT}" >&2; exit 1 ;; \
    esac \
    && python -m pip --python /opt/lookonce/bin/python "$@"
COPY LICENSE README.md ./
COPY protos protos
COPY lookonce lookonce
COPY vision_service vision_service
COPY lm_service lm_service
COPY gateway gateway
RUN python -m pip --python /opt/lookonce/bin/python install -c constraints.txt --no-deps .

FROM ${PYTHON}
LABEL org.opencontainers.image.title="lookonce language service" org.opencontainers.image.licenses="Apache-2.0"
# Weights and what is remembered of them lie in /models: a volume, so that the root can be read-only.
ENV PATH=/opt/lookonce/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/models/hub LOOKONCE_CACHE_DIR=/models/cache \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LOOKONCE_LM_LISTEN=0.0.0.0:50052 LOOKONCE_LM_METRICS_LISTEN=0.0.0.0:9090 LOOKONCE_LM_LOG_FORMAT=json
RUN groupadd --gid 10001 lookonce && useradd --uid 10001 --gid lookonce --no-create-home --home-dir /tmp lookonce \
    && install -d -o lookonce -g lookonce /models
COPY --from=build /opt/lookonce /opt/lookonce
VOLUME /models
USER 10001:10001
EXPOSE 50052 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["sh", "-c", "exec python -m lookonce.cli.health ${LOOKONCE_LM_LISTEN}"]
ENTRYPOINT ["python", "-m", "lm_service"]

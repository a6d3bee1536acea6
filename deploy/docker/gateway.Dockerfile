# The gateway: no torch, no weights. Build from the repository's root:
#   docker build -f deploy/docker/gateway.Dockerfile -t lookonce-gateway .
# Another image by the name your registry has for it, or one that holds your pip.conf and certificates: --build-arg PYTHON=...
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m pip install "pip==25.3" && python -m venv --without-pip /opt/lookonce
COPY pyproject.toml constraints.txt ./
RUN python -m pip --python /opt/lookonce/bin/python install -c constraints.txt --group gateway
COPY LICENSE README.md ./
COPY protos protos
COPY lookonce lookonce
COPY vision_service vision_service
COPY lm_service lm_service
COPY gateway gateway
RUN python -m pip --python /opt/lookonce/bin/python install -c constraints.txt --no-deps .

FROM ${PYTHON}
LABEL org.opencontainers.image.title="lookonce gateway" org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/lookonce/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    LOOKONCE_GATEWAY_HOST=0.0.0.0 LOOKONCE_GATEWAY_PORT=8000 LOOKONCE_GATEWAY_LOG_FORMAT=json
RUN groupadd --gid 10001 lookonce && useradd --uid 10001 --gid lookonce --no-create-home --home-dir /tmp lookonce
COPY --from=build /opt/lookonce /opt/lookonce
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["sh", "-c", "exec python -m lookonce.cli.health http://127.0.0.1:${LOOKONCE_GATEWAY_PORT}"]
ENTRYPOINT ["python", "-m", "gateway"]

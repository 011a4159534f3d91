# syntax=docker/dockerfile:1
# One image with the gateway and its workers, for workers are processes that the gateway starts beside itself. Debian, as the
# Postgres binaries and torch are built against glibc; nothing of it is run but Python and those binaries.
FROM python:3.11.14-slim-bookworm AS build
ARG TORCH=2.13.0
# Another index for torch, of CPU builds say; unset is the default one.
ARG TORCH_INDEX=
WORKDIR /opt/pericarp
RUN python -m venv .venv
COPY requirements.lock ./
RUN .venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --no-deps -r requirements.lock \
 && .venv/bin/pip install --no-cache-dir --disable-pip-version-check ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$TORCH"
COPY alembic.ini LICENSE ./
COPY migrations migrations
COPY cobblestone cobblestone
COPY tenants tenants
COPY models models
COPY service service
RUN .venv/bin/python -m compileall -q service tenants models cobblestone migrations

FROM python:3.11.14-slim-bookworm
RUN useradd --system --uid 10001 --user-group --home-dir /var/lib/pericarp --shell /usr/sbin/nologin pericarp \
 && install -d -o pericarp -g pericarp -m 0700 /var/lib/pericarp
COPY --from=build /opt/pericarp /opt/pericarp
WORKDIR /opt/pericarp
ENV HOME=/var/lib/pericarp \
    PERICARP_HOME=/var/lib/pericarp \
    PERICARP_HOST=0.0.0.0 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# It listens for other containers, and refuses to without TLS, a trusted proxy, or PERICARP_PLAINTEXT=true.
VOLUME ["/var/lib/pericarp"]
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=15s --start-period=120s --retries=3 \
  CMD ["/opt/pericarp/.venv/bin/python", "-m", "service", "health"]
ENTRYPOINT ["/opt/pericarp/.venv/bin/python", "-m", "service"]
CMD ["serve"]

# What every node of a cluster runs: the pinned environment, and the project's source on top. CUDA comes with PyTorch's
# own packages, so the machine brings nothing but the driver.
#   docker build -t REGISTRY/paretovl:1 . && docker push REGISTRY/paretovl:1
FROM python:3.12-slim-bookworm AS environment
ENV UV_PROJECT_ENVIRONMENT=/opt/venv UV_PYTHON=/usr/local/bin/python3.12 UV_LINK_MODE=copy \
    UV_CACHE_DIR=/var/cache/uv
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /opt/paretovl
# Versions follow from exclude-newer in pyproject.toml, also those of the second install: the job server and the
# autoscaler need packages that a study on one machine does not, a study in a database its client.
COPY pyproject.toml README.md LICENSE ./
RUN --mount=type=cache,target=/var/cache/uv \
    uv sync -q --no-dev --no-install-project \
    && uv pip install -q --python /opt/venv 'psycopg[binary]' \
    "ray[default]==$(/opt/venv/bin/python -c 'import ray; print(ray.__version__)')"

FROM python:3.12-slim-bookworm
# The probes of KubeRay call wget. Debian keeps no older version that could be named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home paretovl \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/paretovl.sh
COPY --from=environment /opt/venv /opt/venv
COPY study /opt/paretovl/study
COPY trainables /opt/paretovl/trainables
COPY search_spaces /opt/paretovl/search_spaces
COPY dashboards /opt/paretovl/dashboards
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/paretovl PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/paretovl
CMD ["python", "-m", "study.run", "--help"]

# sd35bench on CPUs: nano at once, any model from a mounted folder.
#   docker build -f docker/cpu.Dockerfile -t sd35bench:cpu .
# Versions are those of constraints.txt; a test holds these two lines against it.
FROM python:3.11-slim AS build
ARG SETUPTOOLS=setuptools>=77
# A range: what builds the wheel is not in the image.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "${SETUPTOOLS}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sd35bench sd35bench
COPY kernels kernels
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist .

FROM python:3.11-slim
# g++ builds the core's kernels and what torch.compile writes, once, into the user's cache.
# No version: Debian keeps the latest one alone.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /opt/constraints.txt
# The largest layer alone, so that a change of the code does not repeat it. Where an index of
# CPU-only wheels is at hand, PIP_EXTRA_INDEX_URL makes it smaller.
ARG TORCH=2.14.1
ARG TORCHVISION=0.29.1
RUN pip install --no-cache-dir -c /opt/constraints.txt "torch==${TORCH}" "torchvision==${TORCHVISION}"
COPY --from=build /dist /dist
RUN pip install --no-cache-dir -c /opt/constraints.txt /dist/*.whl
RUN useradd --create-home --uid 1000 bench && mkdir /data && chown bench:bench /data
USER 1000
WORKDIR /data
VOLUME /data
ENV OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
ENTRYPOINT ["sd35bench"]
CMD ["--help"]

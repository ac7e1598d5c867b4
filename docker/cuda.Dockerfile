# sd35bench on NVIDIA GPUs. The host needs a driver for CUDA 13 and the NVIDIA Container Toolkit;
# CUDA, cuDNN and cuBLAS come with torch's wheels, in the versions of constraints.txt.
#   docker build -f docker/cuda.Dockerfile -t sd35bench:cuda .
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
# Triton and torch.compile call a C compiler for their launchers.
# No version: Debian keeps the latest one alone.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /opt/constraints.txt
ARG TORCH=2.14.1
ARG TORCHVISION=0.29.1
ARG TRITON=3.8.0
ARG CUDA_TOOLKIT=13.0.3.0
ARG NVIDIA_CUDNN_CU13=9.24.0.43
RUN pip install --no-cache-dir -c /opt/constraints.txt "torch==${TORCH}" \
    "torchvision==${TORCHVISION}" "triton==${TRITON}" "cuda-toolkit==${CUDA_TOOLKIT}" \
    "nvidia-cudnn-cu13==${NVIDIA_CUDNN_CU13}"
COPY --from=build /dist /dist
RUN pip install --no-cache-dir -c /opt/constraints.txt /dist/*.whl
RUN useradd --create-home --uid 1000 bench && mkdir /data && chown bench:bench /data
USER 1000
WORKDIR /data
VOLUME /data
# The container toolkit reads these two: all GPUs, and what NVML needs beside computing.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONUNBUFFERED=1
ENTRYPOINT ["sd35bench"]
CMD ["--help"]

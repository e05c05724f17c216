# evomerge in a container, with the versions that the tests pass with:
#   docker build -t evomerge .
#   docker run --rm --gpus all -v "$PWD:/work" -u "$(id -u):$(id -g)" evomerge search search.yaml
# torch is the build of the default package index, which has CUDA's libraries. For a smaller image without them, give
# the address of PyTorch's index of CPU builds, which its installation page shows, and leave out --gpus:
#   docker build -t evomerge --build-arg TORCH_INDEX=ADDRESS .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

ARG TORCH_INDEX=""

# The compiler makes merges of large models several times faster; evomerge works without it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/evomerge
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY evomerge ./evomerge
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip install --no-cache-dir --constraint constraints.txt .

# Any user may run it: caches go where everybody can write.
RUN useradd --create-home --uid 1000 evomerge && install --directory --mode 1777 /cache
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache HOME=/cache
USER 1000
WORKDIR /work
ENTRYPOINT ["evomerge"]
CMD ["--help"]

# The kit with its pinned packages; see "In a container" in docs/first-fine-tune.md.
#   docker build --tag yulan-finetune .                          for NVIDIA GPUs
#   docker build --tag yulan-finetune --build-arg DEVICE=cpu .   without a GPU, some gigabytes smaller
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
ARG DEVICE=cuda

# Triton compiles its kernels with a C compiler when a run on a GPU begins.
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi

WORKDIR /opt/yulan-finetune
COPY constraints.txt ./
# The index of PyTorch has torch without CUDA. Its other packages come from PyPI in the next step, as the constraints say.
RUN torch="$(grep '^torch==' constraints.txt)" && \
    case "$DEVICE" in \
        cpu) pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" ;; \
        cuda) pip install --no-cache-dir --constraint constraints.txt "$torch" ;; \
        *) echo "DEVICE is $DEVICE; it must be cpu or cuda" >&2; exit 2 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY finetune finetune
COPY recipes recipes
COPY templates templates
RUN pip install --no-cache-dir --constraint constraints.txt .

# Downloads, folds and prepared rows; any user of the container may write there. torch asks for a user's name, which a number alone lacks.
ENV FINETUNE_CACHE=/cache/yulan-finetune HF_HOME=/cache/huggingface HOME=/cache USER=finetune
RUN mkdir -m 1777 /cache
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["finetune"]
CMD ["--help"]

# orpo on NVIDIA GPUs.   docker build -t orpo .
# docker run --rm --gpus all --ipc host -v "$PWD":/work -v orpo-cache:/cache orpo train recipe.yaml
#
# PyTorch's wheel on the public index brings CUDA with it; the host needs the driver and the NVIDIA container toolkit.
FROM python:3.12-slim

# torch.compile and triton build small extensions when they are first used.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir --constraint /src/constraints.txt '/src[data,gguf,quant]'

# Models, data and tokens are cached here: mount a volume, or each run downloads them.
ENV HF_HOME=/cache
WORKDIR /work
ENTRYPOINT ["orpo"]

# syntax=docker/dockerfile:1
# A model behind HTTP, or in a browser, with the pinned versions of constraints.txt and the embedded model inside.
#   docker build --target cpu -t unilip:cpu .
#   docker build --target cuda -t unilip:cuda .    (run it with --gpus all)
# What it runs by default is the server; docs/integrations.md has the commands.

ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_CONSTRAINT=/build/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
RUN python -m venv /opt/unilip

# PyTorch goes first and alone: it is large, changes rarely, and is all that differs between the targets.
FROM build AS build-cpu
# PyTorch's index of CPU builds makes the image some gigabytes smaller: --build-arg TORCH_INDEX=ADDRESS.
ARG TORCH_INDEX=
RUN /opt/unilip/bin/pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src ./src
RUN /opt/unilip/bin/pip install '.[serve]' && /opt/unilip/bin/unilip info

FROM build AS build-cuda
RUN /opt/unilip/bin/pip install torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src ./src
RUN /opt/unilip/bin/pip install '.[serve]' && /opt/unilip/bin/unilip info

FROM python:${PYTHON} AS runtime
ENV PATH=/opt/unilip/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/models
RUN useradd --create-home --uid 10001 unilip && mkdir /models && chown unilip /models
WORKDIR /home/unilip
VOLUME /models
EXPOSE 8000 7860
ENTRYPOINT ["unilip"]
# Any address but the machine's own needs a key: set UNILIP_API_KEY, or the server says so and ends.
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/unilip /opt/unilip
USER unilip

# Last, and so what a build without --target makes.
FROM runtime AS cpu
COPY --from=build-cpu /opt/unilip /opt/unilip
USER unilip

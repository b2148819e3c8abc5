FROM python:3.13-slim AS build
WORKDIR /src
COPY requirements/server.txt requirements/
RUN python -m venv /opt/opsentry && /opt/opsentry/bin/pip install --no-cache-dir --require-hashes -r requirements/server.txt
COPY pyproject.toml README.md LICENSE ./
COPY opsentry opsentry
COPY migrations migrations
RUN /opt/opsentry/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.13-slim
RUN useradd --system --uid 10001 opsentry
COPY --from=build /opt/opsentry /opt/opsentry
ENV PATH=/opt/opsentry/bin:$PATH PYTHONUNBUFFERED=1 OPSENTRY_HOST=0.0.0.0
USER opsentry
EXPOSE 8080
ENTRYPOINT ["opsentry"]
CMD ["serve"]

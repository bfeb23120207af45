# docker build -t hibio . && docker run --rm -v "$PWD:/data" hibio demo
FROM python:3.13-slim
WORKDIR /opt/hibio
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[encoders,hub,slide,hdf5,parquet,spatialdata]" \
    && useradd --create-home --uid 1000 hibio && install -d -o hibio /data
USER 1000
WORKDIR /data
ENTRYPOINT ["hibio"]
CMD ["--help"]

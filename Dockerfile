# One image for the server and for hospitals: docker build -t sparsecontrast .
FROM python:3.11-slim
WORKDIR /opt/sparsecontrast/app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY sparsecontrast sparsecontrast
COPY client client
COPY server server
COPY simulation simulation
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt --editable .

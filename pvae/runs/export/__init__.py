"""Exporters of a run's metrics and files to TensorBoard and MLflow."""

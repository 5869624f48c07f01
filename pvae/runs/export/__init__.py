"""Exporters of a run to TensorBoard and MLflow."""

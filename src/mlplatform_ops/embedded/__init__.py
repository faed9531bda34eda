"""The platform on one machine: SeaweedFS, Valkey and MLflow under one supervisor."""

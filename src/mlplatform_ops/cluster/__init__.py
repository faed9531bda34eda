"""The platform on a Kubernetes cluster, from this machine."""

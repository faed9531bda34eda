"""What runs the platform: commands, the embedded servers, the cluster, and the gates in front of Feast."""

"""A gRPC control plane for agent training: one store between algorithms and runners."""

"""gRPC plumbing that every process shares: errors, channels, servers, chunks. Never imports torch."""

"""What every process leans on: errors, identity, records, stores, RPC, telemetry. Never imports torch."""

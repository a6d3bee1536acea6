"""The REST door: translates between HTTP and the transport-neutral core of the gateway."""

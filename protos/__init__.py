"""The contract between the processes: protobuf definitions and the stubs generated from them (`make protos`)."""

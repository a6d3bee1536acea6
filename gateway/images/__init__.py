"""Images as a resource: uploads, records, names, lists, erasure."""

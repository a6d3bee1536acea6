"""Images judged by a policy: the rules, batches of images, the report."""

"""The engine built for many questions on one image: packed steps over prefixes whose KV is held once and shared."""

"""Where embeddings are kept: in memory, in an embedded database, in Redis, or in tiers of these. `open_store` opens
any by URL."""

from lookonce.core.stores.interface import EmbeddingStore, Leases, Store, StoreFailure, StoreStats, Value
from lookonce.core.stores.urls import open_store

__all__ = ["EmbeddingStore", "Leases", "Store", "StoreFailure", "StoreStats", "Value", "open_store"]

"""A stock vLLM server reads image embeddings from a lookonce store instead of encoding images.

`LookonceConnector` is an encoder-cache connector of vLLM (role `ec_consumer`); `Filler` makes the embeddings through a
lookonce vision service, and the message parts that name them.
"""

from __future__ import annotations

CONNECTOR = "LookonceConnector"


def register() -> None:
    """Make the connector known by name. vLLM calls it in each of its processes (`vllm.general_plugins`)."""
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    if CONNECTOR not in ECConnectorFactory._registry:
        ECConnectorFactory.register_connector(CONNECTOR, "lookonce_vllm.connector", CONNECTOR)

"""The moderation policy: what an operator's file asks of an image or a text, for the gateway and the batch job alike.

Knows nothing of models and requests.
"""

from lookonce.moderation.policy.reading import parse_policy, read_policy
from lookonce.moderation.policy.rules import INPUT, SEVERITIES, ImageSize, InputType, Policy, Rule, Severity

__all__ = [
    "INPUT",
    "SEVERITIES",
    "ImageSize",
    "InputType",
    "Policy",
    "Rule",
    "Severity",
    "parse_policy",
    "read_policy",
]

"""The general path: checkpoints of model types that have no family of their own, served by transformers' own classes.

`family` answers for one checkpoint; `architecture` reads its class on the meta device, `processor` prepares images and
lays out prompts, `encoder` and `decoder` are the two halves, `limits` and `self_check` say what is not served.
"""

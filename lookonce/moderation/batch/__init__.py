"""Batch moderation: many images through a policy, resumable at any instant. Never imports torch.

`sources` list the images and read them; `judge` asks the services about one; `ledger` remembers what is known, on
disk; `parts` writes what is finished; `work_loop` joins them. `lookonce moderate` builds them.
"""

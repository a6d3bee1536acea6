"""What a checkpoint says of conversations: its tokenizer and its chat template. For the language half alone."""

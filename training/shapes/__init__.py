"""A small model of the Qwen2-VL architecture that answers questions about images of shapes: data, training,
evaluation."""

"""A step, computed: what it holds, attention, sampling."""

"""Other people's clients, with their defaults, against a real system: `make test-clients`. Each drive is a script that
knows only `scene.py` and runs in an environment of its own, made from requirements/ or node/package.json."""

"""Holds every file of deploy/ to its schema, to our rules and to the settings that the services really have.

`python -m deploy.check` (`make check-deploy`). Each check takes the repository's root and yields what is wrong.
"""

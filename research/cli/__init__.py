"""The `research` command."""

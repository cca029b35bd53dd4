"""``elsa report``: one page of what runs left. docs/architecture.md says which file does what."""

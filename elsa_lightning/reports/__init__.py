"""``elsa report``: one page of what runs left. see docs/architecture.md."""

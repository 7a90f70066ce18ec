"""A recipe: its schema, and how it is found and overridden."""

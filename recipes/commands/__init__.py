"""The commands of `lora-null`, one module each; they stand above all parts and import them inside functions."""

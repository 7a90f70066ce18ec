"""What the rest of the package stands on: processes, files, a model's state, values of data sets."""

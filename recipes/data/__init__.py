"""From files to training examples."""

"""MT-Bench: answers, and a judge."""

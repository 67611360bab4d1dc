"""Random damage to valid documents, for every decoder that reads what strangers send. See scripts/fuzz.py."""

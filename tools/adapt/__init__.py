"""From labelled scans to a bundle: measured, decided, written."""

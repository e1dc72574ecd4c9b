"""What is measured of a trial beside its score, one measure per file."""

"""Reading, splitting and batching rows of labelled text."""

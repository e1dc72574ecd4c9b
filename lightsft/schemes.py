"""Names of the ways in which weights are stored, apart from what carries them out."""

SCHEMES = ("int8", "nf4", "fp4")  # LLM.int8 (2208.07339), NF4 and FP4 (2305.14314)
BASE, ORIGINAL = "base", "original"  # what the change of a merge is added to, beside codes

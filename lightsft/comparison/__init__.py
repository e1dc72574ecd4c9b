"""Strategies on the same data, same splits and same seeds: trials, statistics, report, winner."""

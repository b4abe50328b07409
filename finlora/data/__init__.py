"""The data: fetched, read, audited, corrected, prepared; the test sets."""
